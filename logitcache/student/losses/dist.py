"""Relational distillation: Huang et al., "Knowledge distillation from a stronger teacher" (NeurIPS 2022)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.recipe import Component, Name, Positive
from logitcache.student.losses.base import Need, Weight, every_row, targets_of
from logitcache.targets import Batch, Targets, dense_logits, log_probs

EPSILON = 1e-8


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Return T² · (β · (1 - mean correlation of rows) + γ · (1 - mean correlation of columns)), a scalar.

    Pearson's correlation of softmax(z / T) between student and teacher: of the classes in each row, and of the rows in
    each class. `student`, `teacher`: logits [B, C]. At least float32. A vector without variance is correlated with
    nothing: with one row, the second term is constant.
    """
    p_s, p_t = log_probs(student, temperature).exp(), log_probs(teacher, temperature).exp()
    between = 1 - correlation(p_s, p_t).mean()
    within = 1 - correlation(p_s.T, p_t.T).mean()
    return temperature**2 * (beta * between + gamma * within)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of two matrices [N, M]: [N]."""
    a, b = (values - values.mean(dim=1, keepdim=True) for values in (a, b))
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    found: Tensor = (a * b).sum(dim=1) / (norms + EPSILON)
    return found


class DIST(Component):
    """Correlations in place of divergences; published with weight 2 beside cross-entropy."""

    needs: ClassVar[frozenset[Need]] = frozenset({"dense logits"})
    by_row: ClassVar[bool] = False

    kind: Literal["dist"] = "dist"
    beta: Weight = 1.0
    gamma: Weight = 1.0
    temperature: Positive = 1.0
    weight: Weight = 1.0
    teacher: Name | None = None

    def __call__(self, outputs: Targets, batch: Batch) -> Tensor:
        """Return the unweighted loss of a batch."""
        logits = dense_logits(targets_of(batch.teachers, self.teacher).logits)
        assert isinstance(outputs.logits, Tensor)
        return dist(outputs.logits, logits, self.beta, self.gamma, self.temperature)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return every_row(batch)
