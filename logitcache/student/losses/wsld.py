"""Weighted soft labels: Zhou et al., "Rethinking soft labels for knowledge distillation: a bias-variance tradeoff
perspective" (ICLR 2021).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from logitcache.logits import Logits, log_probs
from logitcache.student.losses.base import (
    Context,
    LossTeacher,
    LossWeight,
    cross,
    known_labels,
    mean_over,
    require_classes,
)
from logitcache.student.losses.temperatures import SingleLabelLoss, Temperature
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, Targets

EPSILON = 1e-7


def wsld(student: Tensor, teacher: Logits, labels: Tensor, temperature: float | Tensor = 2.0) -> Tensor:
    """Return T² · mean of -w Σ p_t log p_s over the labelled rows, a scalar in nats, at least float32; 0 without any.

    p = softmax(z / T), and w = 1 - exp(-CE_s / CE_t) with the cross-entropies against the label at T = 1: rows count
    less that the student knows better than the teacher does. No gradient flows through w. `student`: logits [B, C];
    `teacher`: logits [B, C] or a batch's targets; `labels`: int64 [B], -1 for none. Raises RecipeError for
    fewer than two classes.
    """
    require_classes(student)
    place = labels.clamp(min=0)[:, None]
    ce_s = -log_probs(student.detach()).gather(1, place)[:, 0]
    ce_t = -log_probs(teacher).gather(1, place)[:, 0]
    weight = -(-ce_s / (ce_t + EPSILON)).expm1()
    soft = -cross(log_probs(teacher, temperature).exp(), log_probs(student, temperature))
    return temperature**2 * mean_over(weight * soft, known_labels(labels))


class WSLD(SingleLabelLoss):
    """Soft cross-entropy, weighted by row (Zhou et al. 2021); published with weight 2.5, together with cross-entropy.

    It needs one label per image.
    """

    kind: Literal["wsld"] = "wsld"
    temperature: Temperature = Field(
        default=constant(2.0),
        description="Temperature: divisor of both models' logits before the softmax, or a schedule.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        return wsld(student, teacher, batch.labels, temperature)
