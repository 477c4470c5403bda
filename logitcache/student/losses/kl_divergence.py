"""Soft targets: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015)."""

from typing import ClassVar, Literal

from torch import Tensor

from logitcache.recipe import Component, Name, Positive
from logitcache.student.losses.base import Weight, every_row, targets_of
from logitcache.targets import Batch, Logits, Targets, log_probs


def kl_divergence(student: Tensor, teacher: Logits, temperature: float = 1.0) -> Tensor:
    """Return T² · mean over rows of Σ p_t (log p_t - log p_s), p = softmax(z / T), a scalar in nats, at least float32.

    `student`: logits [B, C]. `teacher`: logits [B, C] or an encoded form. The factor T² keeps the gradient's size
    independent of T. Zero when both agree.
    """
    log_p_s, log_p_t = log_probs(student, temperature), log_probs(teacher, temperature)
    return temperature**2 * (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=1).mean()


class KLDivergence(Component):
    """KL divergence from the teacher's distribution to the student's at a temperature, times T²."""

    needs: ClassVar[str] = "logits"

    kind: Literal["kl_divergence"] = "kl_divergence"
    temperature: Positive = 1.0
    weight: Weight = 1.0
    teacher: Name | None = None

    def __call__(self, outputs: Targets, batch: Batch) -> Tensor:
        """Return the unweighted loss of a batch."""
        assert isinstance(outputs.logits, Tensor)
        return kl_divergence(outputs.logits, targets_of(batch.teachers, self.teacher).logits, self.temperature)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return every_row(batch)
