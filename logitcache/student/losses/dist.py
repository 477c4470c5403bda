"""Relational distillation: Huang et al., "Knowledge distillation from a stronger teacher" (NeurIPS 2022)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from logitcache.logits import Logits, dense_logits, log_probs
from logitcache.student.losses.base import Context, LossTeacher, LossWeight, Need, require_classes
from logitcache.student.losses.temperatures import Temperature, TemperedLoss
from logitcache.student.optim.schedules import Weight, constant
from logitcache.targets import Batch, Targets

SMALLEST_SPREAD = 1e-6
"""Standard deviation over root mean square below which the rounding of float32 decides a correlation."""


def dist(
    student: Tensor, teacher: Logits, beta: float = 1.0, gamma: float = 1.0, temperature: float | Tensor = 1.0
) -> Tensor:
    """Return T² · (β · (1 - mean correlation of rows) + γ · (1 - mean correlation of columns)), a scalar.

    Pearson's correlation of softmax(z / T) between student and teacher: of the classes in each row, and of the rows in
    each class. `student`: logits [B, C]; `teacher`: logits [B, C] or a batch's targets. At least float32. A vector
    without variance is correlated with nothing: with one row, the second term is constant. Raises RecipeError if the
    targets keep no logits, and for fewer than two classes.
    """
    require_classes(student)
    log_p_s, log_p_t = log_probs(student, temperature), log_probs(dense_logits(teacher), temperature)
    between = 1 - correlation(log_p_s, log_p_t).mean()
    within = 1 - correlation(log_p_s.T, log_p_t.T).mean()
    return temperature**2 * (beta * between + gamma * within)


def correlation(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of two matrices [N, M], given as logarithms: [N].

    The authors add 1e-8 to the product of norms, which outweighs it for the small probabilities of many classes. Here
    what keeps the quotient finite is relative to each vector.
    """
    a, b = _directions(log_a), _directions(log_b)
    return (a * b).sum(dim=1)


def _directions(log_values: Tensor) -> Tensor:
    """Centre each row of exp(log_values) [N, M] and divide it by its norm; a row without variance becomes 0."""
    # A correlation does not depend on scale: over its largest number, no row underflows.
    values = (log_values - log_values.detach().amax(dim=1, keepdim=True)).exp()
    centred = values - values.mean(dim=1, keepdim=True)
    least = SMALLEST_SPREAD * torch.linalg.vector_norm(values, dim=1, keepdim=True)
    norms: Tensor = (centred.square().sum(dim=1, keepdim=True) + least.square()).sqrt()
    return centred / norms


class DIST(TemperedLoss):
    """Correlations instead of divergences (Huang et al. 2022); published with weight 2, together with cross-entropy.

    It compares the images of a batch with one another, so `micro_batches` above 1 and a last batch of one or two images
    are refused. Correlations are exact for any number of classes, whereas the authors add 1e-8 to the product of norms,
    which dominates for rare classes.
    """

    asks: ClassVar[frozenset[Need]] = frozenset({"raw logits"})
    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 3  # within a class, two numbers correlate by 1 or -1
    exclusive: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("beta", "gamma")

    kind: Literal["dist"] = "dist"
    beta: Weight = Field(
        default=constant(1.0), description="Weight of the correlations between the classes of each image."
    )
    gamma: Weight = Field(
        default=constant(1.0), description="Weight of the correlations between the images of each class."
    )
    temperature: Temperature = Field(
        default=constant(1.0),
        description="Temperature: divisor of both models' logits before the softmax, or a schedule.",
        examples=[4, {"kind": "linear", "start": 8, "stop": 1}],
    )
    weight: LossWeight = constant(1.0)
    teacher: LossTeacher = None

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        beta, gamma = (weight.at(context.progress) for weight in (self.beta, self.gamma))
        return dist(student, teacher, beta, gamma, temperature)
