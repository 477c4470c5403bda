"""Transfer of Grad-CAM maps: Selvaraju et al., "Grad-CAM" (ICCV 2017), for what is compared; Guo et al., "Class
attention transfer based knowledge distillation" (CVPR 2023), for comparing normalised maps of classes.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from logitcache import reductions
from logitcache.logits import at_least_float32, top1
from logitcache.reductions import FeatureKind, resized
from logitcache.student.adapters import PlaceMap, as_places, unit
from logitcache.student.losses.base import UNLABELLED, Context, FeatureLoss, Need, Site, targets_of
from logitcache.targets import Batch, Targets
from logitcache.views.datasets.images.labels import single_labels


def grad_cam(logits: Tensor, student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """Return the mean over places of (m_s - m_t)², a scalar, at least float32; zero if both agree but for scale.

    m is the Grad-CAM map as one vector an image of L2 norm 1, or of zeros if nothing speaks for the class.
    `student`: maps [B, C, h, w] or tokens [B, N, C] from which the student's `logits` [B, K] were computed, by
    operations that can be differentiated twice; its map is brought to the teacher's size. `teacher`: maps [B, H, W];
    `classes`: int64 [B].
    """
    wanted = at_least_float32(teacher)
    score = logits.gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, student, create_graph=True)
    maps = as_places(reductions.grad_cam(at_least_float32(student), at_least_float32(gradient)))
    found = resized(maps, (wanted.shape[1], wanted.shape[2]))
    return (unit(found.flatten(1)) - unit(wanted.flatten(1))).square().mean()


class GradCAM(FeatureLoss):
    """Squared difference of normalised Grad-CAM maps (Selvaraju et al. 2017; Guo et al. 2023).

    Maps are those of the label or, without one, of the teacher's predicted class. It needs logits in addition to the
    feature; `compile` is refused, and attention uses the math kernel, as fused kernels have no second derivative.
    """

    differentiates: ClassVar[bool] = True
    asks: ClassVar[frozenset[Need]] = frozenset({"logits"})
    kinds: ClassVar[tuple[FeatureKind, ...]] = ("grad_cam",)

    kind: Literal["grad_cam"] = "grad_cam"

    def adapter(self, site: Site) -> nn.Module:
        """Build what brings the teacher's map, as it is kept, to places; nothing of it is trained."""
        return PlaceMap(*self.shapes(site))

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        _, teacher = self.compared(outputs, batch)
        labels = single_labels(batch.labels)
        classes = torch.where(labels == UNLABELLED, top1(targets_of(batch.teachers, self.teacher)), labels)
        return grad_cam(outputs.logits, outputs.features[self.student], context.adapter(teacher), classes)
