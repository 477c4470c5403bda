"""Relational distillation: Huang et al., "Knowledge distillation from a stronger teacher" (NeurIPS 2022)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.logits import Logits, dense_logits, log_probs
from logitcache.recipe import Name
from logitcache.student.losses.base import Context, Need
from logitcache.student.losses.temperatures import Temperature, TemperedLoss
from logitcache.student.schedules import Weight, constant
from logitcache.targets import Batch, Targets

EPSILON = 1e-8


def dist(
    student: Tensor, teacher: Logits, beta: float = 1.0, gamma: float = 1.0, temperature: float | Tensor = 1.0
) -> Tensor:
    """Return T² · (β · (1 - mean correlation of rows) + γ · (1 - mean correlation of columns)), a scalar.

    Pearson's correlation of softmax(z / T) between student and teacher: of the classes in each row, and of the rows in
    each class. `student`: logits [B, C]; `teacher`: logits [B, C] or a batch's targets. At least float32. A vector
    without variance is correlated with nothing: with one row, the second term is constant. Raises RecipeError if the
    targets keep no logits.
    """
    p_s, p_t = log_probs(student, temperature).exp(), log_probs(dense_logits(teacher), temperature).exp()
    between = 1 - correlation(p_s, p_t).mean()
    within = 1 - correlation(p_s.T, p_t.T).mean()
    return temperature**2 * (beta * between + gamma * within)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of two matrices [N, M]: [N]."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (a, b))
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    found: Tensor = (a * b).sum(dim=1) / (norms + EPSILON)
    return found


class DIST(TemperedLoss):
    """Correlations in place of divergences; published with weight 2 beside cross-entropy."""

    by_row: ClassVar[bool] = False
    min_rows: ClassVar[int] = 3  # within a class, two numbers correlate by 1 or -1
    exclusive: ClassVar[bool] = True

    kind: Literal["dist"] = "dist"
    beta: Weight = constant(1.0)
    gamma: Weight = constant(1.0)
    temperature: Temperature = constant(1.0)
    weight: Weight = constant(1.0)
    teacher: Name | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss asks of its data."""
        return frozenset({"dense logits", *self.temperature.needs})

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        student, teacher, temperature = self.compared(outputs, batch, context)
        beta, gamma = (weight.at(context.progress) for weight in (self.beta, self.gamma))
        return dist(student, teacher, beta, gamma, temperature)
