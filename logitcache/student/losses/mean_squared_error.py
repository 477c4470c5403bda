"""Logit matching: Ba and Caruana, "Do deep nets really need to be deep?" (2014)."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from logitcache.logits import Logits, at_least_float32, dense_logits
from logitcache.student.losses.base import Context, LossBase, LossTeacher, LossWeight, Need, targets_of
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, Targets


def mean_squared_error(student: Tensor, teacher: Logits) -> Tensor:
    """Return the mean of (z_s - z_t)² over rows and classes, a scalar, at least float32.

    `student`: logits [B, C]; `teacher`: logits [B, C] or a batch's targets. Raises RecipeError if these keep no logits.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(dense_logits(teacher)))


class MeanSquaredError(LossBase):
    """Squared error between logits (Ba and Caruana 2014); needs raw logits."""

    asks: ClassVar[frozenset[Need]] = frozenset({"raw logits"})

    kind: Literal["mean_squared_error"] = "mean_squared_error"
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        return mean_squared_error(outputs.logits, targets_of(batch.teachers, self.teacher))
