"""Decoupled distillation: Zhao et al., "Decoupled knowledge distillation" (CVPR 2022)."""

from typing import ClassVar, Literal

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


def dkd(
    student: Tensor,
    teacher: Logits,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    """Return T² · mean of α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s) over the labelled rows, a scalar in nats.

    b = [p_y, 1 - p_y] is label against rest, p̂ the distribution over the other classes alone, of softmax(z / T).
    `student`: logits [B, C]; `teacher`: logits [B, C] or a batch's targets; `labels`: int64 [B], -1 for none. At least
    float32; 0 without labels, and if both agree. Raises RecipeError for fewer than two classes.
    """
    require_classes(student)
    own_s, rest_s, others_s = split_by_label(log_probs(student, temperature), labels)
    own_t, rest_t, others_t = split_by_label(log_probs(teacher, temperature), labels)
    against_rest = own_t.exp() * (own_t - own_s) + rest_t.exp() * (rest_t - rest_s)
    among_others = cross(others_t.exp(), others_t - others_s)
    return temperature**2 * mean_over(alpha * against_rest + beta * among_others, known_labels(labels))


class DKD(SingleLabelLoss):
    """Decoupled distillation: the label against the other classes, and the others among themselves (Zhao et al. 2022).

    It needs one label per image and is used together with `cross_entropy`. The authors increase the weight over the
    first 20 of 240 epochs on CIFAR-100: `weight: {kind: warm_up, value: 1, epochs: 20}`.
    """

    terms: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    kind: Literal["dkd"] = "dkd"
    alpha: Weight = Field(
        default=constant(1.0), description="Weight of the divergence between the label and all other classes."
    )
    beta: Weight = Field(default=constant(8.0), description="Weight of the divergence among the other classes.")
    temperature: Temperature = Field(
        default=constant(4.0),
        description="Temperature: divisor of both models' logits before the softmax, or a schedule.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        alpha, beta = (weight.at(context.progress) for weight in (self.alpha, self.beta))
        return dkd(student, teacher, batch.labels, alpha, beta, temperature)
