"""Normalised distillation: Yang et al., "From knowledge distillation to self-knowledge distillation: a unified approach
with normalized loss and customized soft labels" (ICCV 2023).
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
    split_by_label,
)
from logitcache.student.losses.temperatures import SingleLabelLoss, Temperature
from logitcache.student.optim.schedules import Weight, constant
from logitcache.targets import Batch, Targets


def nkd(
    student: Tensor, teacher: Logits, labels: Tensor, gamma: float = 1.5, temperature: float | Tensor = 1.0
) -> Tensor:
    """Return the mean of -p_t[y] log p_s[y] - γ T² Σ p̂_t log p̂_s over the labelled rows, a scalar in nats.

    p = softmax(z); p̂ is the distribution over the classes other than the label, of softmax(z / T). `student`: logits
    [B, C]; `teacher`: logits [B, C] or a batch's targets; `labels`: int64 [B], -1 for none. At least float32; 0 without
    labels. Smallest, not zero, if both agree on the others and the student is sure of the label.
    Raises RecipeError for fewer than two classes.
    """
    require_classes(student)
    own_s, _, _ = split_by_label(log_probs(student), labels)
    own_t, _, _ = split_by_label(log_probs(teacher), labels)
    _, _, others_s = split_by_label(log_probs(student, temperature), labels)
    _, _, others_t = split_by_label(log_probs(teacher, temperature), labels)
    rows = -own_t.exp() * own_s - gamma * temperature**2 * cross(others_t.exp(), others_s)
    return mean_over(rows, known_labels(labels))


class NKD(SingleLabelLoss):
    """Normalised distillation: soft cross-entropy of the label and, separately, of the other classes (Yang et al.
    2023).

    It needs one label per image and is used together with `cross_entropy`.
    """

    kind: Literal["nkd"] = "nkd"
    gamma: Weight = Field(default=constant(1.5), description="Weight of the part of the other classes.")
    temperature: Temperature = Field(
        default=constant(1.0),
        description="Temperature: divisor of both models' logits in the part of the other classes, or a schedule.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        return nkd(student, teacher, batch.labels, self.gamma.at(context.progress), temperature)
