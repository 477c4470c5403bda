"""Soft targets for images with any number of labels: each class is a binary question of its own."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from logitcache.logits import Logits, at_least_float32, dense_logits
from logitcache.student.losses.base import Context, LossTeacher, LossWeight, Need
from logitcache.student.losses.temperatures import Temperature, TemperedLoss
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, Targets


def multi_label_kl(student: Tensor, teacher: Logits, temperature: float | Tensor = 1.0) -> Tensor:
    """Return T² · mean over rows and classes of KL(σ(z_t / T) ‖ σ(z_s / T)), a scalar in nats, at least float32.

    `student`: logits [B, C]; `teacher`: logits [B, C] or a batch's targets. Zero when both agree. Raises RecipeError if
    the targets keep no logits.
    """
    z_s, z_t = (at_least_float32(logits) / temperature for logits in (student, dense_logits(teacher)))
    yes, no = (
        F.logsigmoid(sign * z_t).exp() * (F.logsigmoid(sign * z_t) - F.logsigmoid(sign * z_s)) for sign in (1, -1)
    )
    return temperature**2 * (yes + no).mean()


class MultiLabelKL(TemperedLoss):
    """Binary KL divergence of every class, times T², for multi-label teachers."""

    asks: ClassVar[frozenset[Need]] = frozenset({"raw logits"})

    kind: Literal["multi_label_kl"] = "multi_label_kl"
    temperature: Temperature = Field(
        default=constant(1.0),
        description="Temperature T: divisor of both models' logits before the sigmoid, or a schedule.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        return multi_label_kl(student, teacher, temperature)
