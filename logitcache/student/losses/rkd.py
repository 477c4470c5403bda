"""Relational distillation: Park et al., "Relational knowledge distillation" (CVPR 2019)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from logitcache.logits import at_least_float32
from logitcache.reductions import pooled
from logitcache.student.adapters import unit
from logitcache.student.losses.base import Context, FeatureLoss, full_precision
from logitcache.student.optim.schedules import Weight, constant
from logitcache.targets import Batch, Targets


@full_precision
def rkd(student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Return distance · smooth-L1 of distances + angle · smooth-L1 of angles, a scalar; zero if both agree.

    Distances of all pairs of images, over the mean of those that are not 0; cosines of the angles of all triples. Both
    as means over the B² and B³ of them. `student` and `teacher`: vectors [B, C] and [B, D], at least float32; B² · C
    numbers are held.
    """
    pairs_s, pairs_t = (features[None] - features[:, None] for features in map(at_least_float32, (student, teacher)))
    apart = F.smooth_l1_loss(_distances(pairs_s), _distances(pairs_t))
    return distance * apart + angle * F.smooth_l1_loss(_angles(pairs_s), _angles(pairs_t))


def _distances(pairs: Tensor) -> Tensor:
    found = torch.linalg.vector_norm(pairs, dim=2)
    mean = found.sum() / (found > 0).sum().clamp(min=1)
    over_mean: Tensor = found / mean.where(mean > 0, 1)
    return over_mean


def _angles(pairs: Tensor) -> Tensor:
    directions = unit(pairs)
    return torch.bmm(directions, directions.transpose(1, 2))


class RKD(FeatureLoss):
    """Distances and angles between the images of a batch, on pooled features (Park et al. 2019).

    It compares the images of a batch with one another, so `micro_batches` above 1 and a last batch of one or two images
    are refused. It needs memory for B² · C numbers.
    """

    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 3  # distances are over their mean: of one pair all are alike
    terms: ClassVar[tuple[str, ...]] = ("distance", "angle")

    kind: Literal["rkd"] = "rkd"
    distance: Weight = Field(default=constant(25.0), description="Weight of the distances between pairs of images.")
    angle: Weight = Field(default=constant(50.0), description="Weight of the angles of triples of images.")

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        distance, angle = (weight.at(context.progress) for weight in (self.distance, self.angle))
        student, teacher = map(pooled, self.compared(outputs, batch))
        return rkd(student, teacher, distance, angle)
