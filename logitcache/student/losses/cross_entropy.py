"""Cross-entropy against labels."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.config.recipe import Fraction, Lenient
from logitcache.logits import at_least_float32
from logitcache.student.losses.base import (
    UNLABELLED,
    Context,
    LossBase,
    LossWeight,
    Need,
    Site,
    known_labels,
    mean_over,
    require_classes,
)
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, MixedLabels, Targets


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, mixed: MixedLabels | None = None
) -> Tensor:
    """Return the mean of -log p[label] over the labelled rows, a scalar in nats, at least float32; 0 without labels.

    `logits`: [B, C]; `labels`: int64 [B], -1 for none. Where images are `mixed`, a row is the weighted sum over its own
    label and its partner's, and counts if both are known. Raises RecipeError for fewer than two classes.
    """
    require_classes(logits)
    scores = at_least_float32(logits)
    rows = _rows(scores, labels, label_smoothing)
    if mixed is not None:
        share = mixed.share.to(scores.dtype)
        rows = share * rows + (1 - share) * _rows(scores, mixed.partners, label_smoothing)
    return mean_over(rows, known_labels(labels, mixed))


def _rows(scores: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(scores, labels, ignore_index=UNLABELLED, reduction="none", label_smoothing=label_smoothing)


class LogPriors(nn.Module):
    """Add τ log π to logits, π the classes' frequencies among the labelled images.

    Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), equation 10. A class without an image counts
    as if it had one.
    """

    added: Tensor

    def __init__(self, class_counts: Tensor, tau: float) -> None:
        """Take the images of each class, [C]."""
        super().__init__()
        counts = class_counts.double().clamp(min=1)
        self.register_buffer("added", (tau * (counts / counts.sum()).log()).float())

    def forward(self, logits: Tensor) -> Tensor:
        """Return the adjusted logits [B, C], at least float32."""
        return at_least_float32(logits) + self.added


class CrossEntropy(LossBase):
    """Cross-entropy with the labels, mixed if images are; images without a label are ignored."""

    asks: ClassVar[frozenset[Need]] = frozenset({"labels"})
    exclusive: ClassVar[bool] = True
    teacher: ClassVar[str | None] = None

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Fraction = Field(
        default=0.0, description="Share of each label's probability to spread over all classes."
    )
    logit_adjustment: Annotated[float, Field(ge=0.0), Lenient] = Field(
        default=0.0,
        description="Factor τ of τ log π, which is added to the logits during training, with π the class frequencies "
        "of the training images (Menon et al. 2021). 0 adds nothing; 1 is usual for long-tailed data.",
    )
    weight: LossWeight = constant(1.0)

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        return cross_entropy(context.adapter(outputs.logits), batch.labels, self.label_smoothing, batch.mixed)

    def adapter(self, site: Site) -> nn.Module:
        """Build what adjusts the logits, on their device."""
        if not self.logit_adjustment:
            return nn.Identity()
        assert site.class_counts is not None, "the loss needs labels"
        return LogPriors(site.class_counts, self.logit_adjustment)

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return known_labels(batch.labels, batch.mixed).sum()
