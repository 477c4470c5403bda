"""Soft targets for images with any number of labels: each class is a binary question of its own."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from logitcache.recipe import Component, Name, Positive
from logitcache.student.losses.base import Need, Weight, every_row, targets_of
from logitcache.targets import Batch, Targets, at_least_float32, dense_logits


def multi_label_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² · mean over rows and classes of KL(σ(z_t / T) ‖ σ(z_s / T)), a scalar in nats, at least float32.

    `student`, `teacher`: logits [B, C]. Zero when both agree.
    """
    z_s, z_t = (at_least_float32(logits) / temperature for logits in (student, teacher))
    yes, no = (
        F.logsigmoid(sign * z_t).exp() * (F.logsigmoid(sign * z_t) - F.logsigmoid(sign * z_s)) for sign in (1, -1)
    )
    return temperature**2 * (yes + no).mean()


class MultiLabelKL(Component):
    """Binary KL divergence of every class, for teachers of several labels an image."""

    needs: ClassVar[frozenset[Need]] = frozenset({"dense logits"})
    by_row: ClassVar[bool] = True

    kind: Literal["multi_label_kl"] = "multi_label_kl"
    temperature: Positive = 1.0
    weight: Weight = 1.0
    teacher: Name | None = None

    def __call__(self, outputs: Targets, batch: Batch) -> Tensor:
        """Return the unweighted loss of a batch."""
        logits = dense_logits(targets_of(batch.teachers, self.teacher).logits)
        assert isinstance(outputs.logits, Tensor)
        return multi_label_kl(outputs.logits, logits, self.temperature)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return every_row(batch)
