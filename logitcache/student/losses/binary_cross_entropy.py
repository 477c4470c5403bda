"""Binary cross-entropy against the known labels of any number of classes an image."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from logitcache.config.recipe import Positive
from logitcache.errors import RecipeError
from logitcache.logits import at_least_float32
from logitcache.student.losses.base import Context, LossBase, LossWeight, Need, Site, known_labels, mean_over
from logitcache.student.optim.schedules import constant
from logitcache.targets import Batch, MixedLabels, Targets


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, positive_weight: float | Tensor = 1.0, mixed: MixedLabels | None = None
) -> Tensor:
    """Return the mean of -w y log σ(z) - (1 - y) log σ(-z) over the known labels, a scalar in nats; 0 without any.

    `logits`: [B, C]; `labels`: [B, C], 1, 0 or -1 for what is unknown; `positive_weight` w: one for all classes or [C].
    Where images are `mixed`, y is the weighted mean of the own label and the partner's, and counts if both are known.
    At least float32.
    """
    scores = at_least_float32(logits)
    wanted = labels.to(scores.dtype)
    if mixed is not None:
        share = mixed.share.to(scores.dtype)[:, None]
        wanted = share * wanted + (1 - share) * mixed.partners.to(scores.dtype)
    weight = torch.as_tensor(positive_weight, dtype=scores.dtype, device=scores.device)
    terms = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none", pos_weight=weight)
    return mean_over(terms, known_labels(labels, mixed))


class PositiveWeights(nn.Module):
    """By how much more a class counts in images of it, [1] or [C]."""

    weights: Tensor

    def __init__(self, weights: tuple[float, ...]) -> None:
        """Take one weight for all classes, or one for each."""
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))


class BinaryCrossEntropy(LossBase):
    """Binary cross-entropy of every class with multi-label targets, mixed if images are.

    Unknown labels (-1) are ignored.
    """

    asks: ClassVar[frozenset[Need]] = frozenset({"multi labels"})
    teacher: ClassVar[str | None] = None

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    positive_weight: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        default=1.0,
        description="Factor of the positive labels, one for all classes or one for each; above 1 for classes with few "
        "positive images.",
    )
    weight: LossWeight = constant(1.0)

    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch."""
        assert isinstance(context.adapter, PositiveWeights)
        return binary_cross_entropy(outputs.logits, batch.labels, context.adapter.weights, batch.mixed)

    def adapter(self, site: Site) -> nn.Module:
        """Hold the weights on the model's device; raises RecipeError for those of other classes."""
        given = self.positive_weight
        if not isinstance(given, tuple):
            return PositiveWeights((given,))
        assert site.class_counts is not None, "the loss needs labels"
        if len(given) != len(site.class_counts):
            raise RecipeError(
                f"positive_weight has {len(given)} numbers for {len(site.class_counts)} classes. "
                "Fix: one for each class, or one number for all"
            )
        return PositiveWeights(given)

    def rows(self, batch: Batch) -> Tensor:
        """Count the labels that the loss is a mean over."""
        return known_labels(batch.labels, batch.mixed).sum()
