"""Hints: Romero et al., "FitNets: hints for thin deep nets" (ICLR 2015)."""

from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureKind
from logitcache.student.adapters import Projection, matched, num_channels
from logitcache.student.losses.base import Context, FeatureLoss, Site
from logitcache.targets import Batch, Targets


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of (f_s - f_t)² over all numbers, a scalar, at least float32.

    Features of one shape: the student's come out of a regressor that is trained with it.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


class Hint(FeatureLoss):
    """Squared error between the teacher's features and a 1 × 1 convolution of the student's (FitNets, Romero et al.
    2015).

    Usual with weight 100. The convolution is used even if the numbers of channels are equal, as channels of two
    networks do not correspond.
    """

    kinds: ClassVar[tuple[FeatureKind, ...]] = ("maps", "pooled")

    kind: Literal["hint"] = "hint"

    def adapter(self, site: Site) -> nn.Module:
        """Build the regressor."""
        student, kept = self.shapes(site)
        return Projection(*num_channels(student, kept.shape))

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher = matched(*self.compared(outputs, batch))
        return hint(context.adapter(student), teacher)
