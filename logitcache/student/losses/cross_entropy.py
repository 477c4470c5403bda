"""Cross-entropy against labels, where there are labels."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from logitcache.recipe import Component, Fraction
from logitcache.student.losses.base import UNLABELLED, Need, Weight
from logitcache.targets import Batch, MixedLabels, Targets, at_least_float32


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, mixed: MixedLabels | None = None
) -> Tensor:
    """Return the mean of -log p[label] over the labelled rows, a scalar in nats, at least float32; 0 without labels.

    `logits`: [B, C]; `labels`: int64 [B], -1 for none. Where images are `mixed`, a row is the weighted sum over its own
    label and its partner's, and counts if both are known.
    """
    scores = at_least_float32(logits)
    rows = _rows(scores, labels, label_smoothing)
    if mixed is not None:
        share = mixed.share.to(scores.dtype)
        rows = share * rows + (1 - share) * _rows(scores, mixed.partners, label_smoothing)
    counted = _counted(labels, mixed)
    return rows.where(counted, 0).sum() / counted.sum().clamp(min=1).to(rows.dtype)


def _rows(scores: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(scores, labels, ignore_index=UNLABELLED, reduction="none", label_smoothing=label_smoothing)


def _counted(labels: Tensor, mixed: MixedLabels | None) -> Tensor:
    """Return which rows have every label that they are made of, bool [B]."""
    known = labels != UNLABELLED
    return known if mixed is None else known & (mixed.partners != UNLABELLED)


class CrossEntropy(Component):
    """Cross-entropy against the labels; rows without a label do not count."""

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    by_row: ClassVar[bool] = True
    teacher: ClassVar[str | None] = None

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Fraction = 0.0
    weight: Weight = 1.0

    def __call__(self, outputs: Targets, batch: Batch) -> Tensor:
        """Return the unweighted loss of a batch."""
        assert isinstance(outputs.logits, Tensor)
        return cross_entropy(outputs.logits, batch.labels, self.label_smoothing, batch.mixed)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return _counted(batch.labels, batch.mixed).sum()
