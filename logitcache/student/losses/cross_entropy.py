"""Cross-entropy against labels, where there are labels."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from logitcache.recipe import Component, Fraction
from logitcache.student.losses.base import Weight
from logitcache.targets import Batch, Targets, at_least_float32

UNLABELLED = -1


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of -log p[label] over the labelled rows, a scalar in nats, at least float32; 0 without labels.

    `logits`: [B, C]; `labels`: int64 [B], -1 for none.
    """
    total = F.cross_entropy(
        at_least_float32(logits), labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != UNLABELLED).sum().clamp(min=1).to(total.dtype)


class CrossEntropy(Component):
    """Cross-entropy against the labels; rows without a label do not count."""

    needs: ClassVar[str] = "labels"
    teacher: ClassVar[str | None] = None

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    weight: Weight = 1.0

    def __call__(self, outputs: Targets, batch: Batch) -> Tensor:
        """Return the unweighted loss of a batch."""
        assert isinstance(outputs.logits, Tensor)
        return cross_entropy(outputs.logits, batch.labels, self.label_smoothing)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return (batch.labels != UNLABELLED).sum()
