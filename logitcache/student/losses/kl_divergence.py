"""Soft targets: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015); with logits
standardised as in Sun et al., "Logit standardization in knowledge distillation" (CVPR 2024).
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from logitcache.logits import Logits, at_least_float32, dense_logits, log_probs, scaled
from logitcache.student.losses.base import Context, LossTeacher, LossWeight, Need, require_classes
from logitcache.student.losses.temperatures import RowTemperature, TemperedLoss
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, Targets

EPSILON = 1e-7


def kl_divergence(student: Tensor, teacher: Logits, temperature: float | Tensor = 1.0) -> Tensor:
    """Return T² · mean over rows of Σ p_t (log p_t - log p_s), p = softmax(z / T), a scalar in nats, at least float32.

    `student`: logits [B, C]. `teacher`: logits [B, C] or a batch's targets. `temperature`: one for all, or one for each
    row [B]. The factor T² keeps the gradient's size independent of T. Zero when both agree. Raises RecipeError for
    fewer than two classes.
    """
    require_classes(student)
    log_p_s, log_p_t = log_probs(student, temperature), log_probs(teacher, temperature)
    rows = (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=1)
    return scaled(rows, temperature**2).mean()


def standardize(logits: Logits) -> Tensor:
    """Bring each row of logits [B, C] to mean 0 and (unbiased) standard deviation 1, at least in float32.

    Raises RecipeError for fewer than two classes.
    """
    values = at_least_float32(dense_logits(logits))
    require_classes(values)
    return (values - values.mean(dim=1, keepdim=True)) / (EPSILON + values.std(dim=1, keepdim=True))


class KLDivergence(TemperedLoss):
    """KL divergence KL(teacher ‖ student) at a temperature T, times T² (Hinton et al. 2015)."""

    exclusive: ClassVar[bool] = True

    kind: Literal["kl_divergence"] = "kl_divergence"
    temperature: RowTemperature = Field(
        default=constant(1.0),
        description="Temperature T: divisor of both models' logits before the softmax, or a schedule; `by_confidence` "
        "gives each image its own.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    standardize: bool = Field(
        default=False,
        description="Whether both models' logits are standardised first, row by row (Sun et al. 2024, with T = 2 "
        "and weight 9); needs dense logits.",
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss needs of its data."""
        return super().needs | {"raw logits" if self.standardize else "logits"}

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        if not self.standardize:
            return kl_divergence(student, teacher, temperature)
        return kl_divergence(standardize(student), standardize(teacher), temperature)
