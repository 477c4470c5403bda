"""Several teachers as one: ensembles by name, built from the teachers of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from logitcache.config.recipe import Component, Name, Positive
from logitcache.errors import MismatchError, RecipeError, caught, raise_all
from logitcache.logits import NO_LOGITS, EnsembleLogits
from logitcache.student.losses.base import UNLABELLED
from logitcache.targets import Batch, Targets

Members = Annotated[tuple[Name, ...], Field(min_length=2)]


class EnsembleBase(Component, ABC):
    """How several `teachers`, by default all that have logits, become one: the weight of each, row by row."""

    needs_labels: ClassVar[bool] = False

    kind: str
    teachers: Members | None = Field(
        default=None,
        description="Members: teachers of the cache; by default all that have logits.",
        examples=[["a", "b"]],
    )

    @abstractmethod
    def weigh(self, log_p: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the weights [B, M] of members, from each one's log-probabilities [B, C] at T = 1."""


class Mean(EnsembleBase):
    """The mean of the members' probabilities."""

    kind: Literal["mean"] = "mean"
    weights: tuple[Positive, ...] | None = Field(
        default=None,
        description="Weights of `teachers`, which must then be listed; normalised to a sum of 1. By default all are "
        "equal.",
        examples=[[1, 3]],
    )

    @model_validator(mode="after")
    def _weights_have_names(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.teachers or ()):
            raise ValueError("weights are one for each of `teachers`, which must be named")
        return self

    def weigh(self, log_p: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the same weights for each row."""
        weights = self.weights or (1.0,) * len(log_p)
        share = [weight / sum(weights) for weight in weights]
        return torch.stack([log_p[0].new_full((len(batch),), value) for value in share], dim=1)


class ByConfidence(EnsembleBase):
    """Weight members by their cross-entropy L with the label, the larger the less: w_k = (1 - softmax(L)_k) / (M - 1).

    Zhang, Chen and Wang, "Confidence-aware multi-teacher knowledge distillation" (ICASSP 2022). Rows without a label
    weight members equally; if images are mixed, L is the mean over both labels, weighted by their shares.
    """

    needs_labels: ClassVar[bool] = True

    kind: Literal["by_confidence"] = "by_confidence"

    def weigh(self, log_p: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the weights of each row."""
        entropies = torch.stack([_cross_entropies(member, batch) for member in log_p], dim=1)
        return (1 - torch.softmax(entropies, dim=1)) / (len(log_p) - 1)


class ByEntropy(EnsembleBase):
    """Weight members by their confidence: the weights are softmax(-H), with H the entropy of each in nats.

    Weighting by entropy is from Kwon et al., "Adaptive knowledge distillation based on entropy" (ICASSP 2020); the
    softmax is ours.
    """

    kind: Literal["by_entropy"] = "by_entropy"

    def weigh(self, log_p: Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the weights of each row."""
        entropies = [torch.special.entr(member.exp()).sum(dim=1) for member in log_p]
        return torch.softmax(-torch.stack(entropies, dim=1), dim=1)


def _cross_entropies(log_p: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of log-probabilities [B, C] with each row's label or labels, 0 if one is missing."""
    # Of an infinite loss, neither the share 0 nor the softmax beside another would be a number.
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    rows = F.nll_loss(log_p, batch.labels, ignore_index=UNLABELLED, reduction="none")
    if batch.mixed is None:
        return rows
    partners, share = batch.mixed.partners, batch.mixed.share
    both = share * rows + (1 - share) * F.nll_loss(log_p, partners, ignore_index=UNLABELLED, reduction="none")
    return both.where((batch.labels != UNLABELLED) & (partners != UNLABELLED), 0)


Ensemble = Annotated[Mean | ByConfidence | ByEntropy, Field(discriminator="kind")]


def with_ensembles(batch: Batch, ensembles: Mapping[str, Ensemble]) -> Batch:
    """Add each ensemble's targets to a batch, under the ensemble's name."""
    if not ensembles:
        return batch
    added = {name: _answer(ensemble, batch) for name, ensemble in ensembles.items()}
    return replace(batch, teachers={**batch.teachers, **added})


@torch.no_grad()
def _answer(ensemble: Ensemble, batch: Batch) -> Targets:
    with_logits = [name for name, targets in batch.teachers.items() if targets.compact is not NO_LOGITS]
    members = [batch.teachers[name] for name in ensemble.teachers or with_logits]
    log_p = [member.log_probs() for member in members]
    forms = tuple(member.compact for member in members)
    return Targets(EnsembleLogits(forms, ensemble.weigh(log_p, batch), log_p[0].shape[1]))


def num_classes_of(ensembles: Mapping[str, Ensemble], teachers: Mapping[str, int], labelled: bool) -> dict[str, int]:
    """Return the number of classes of teachers and ensembles, from those of the teachers that have logits.

    Raises RecipeError or MismatchError if an ensemble cannot be made of them, or needs labels without `labelled`.
    """
    checks = [partial(_require_members, name, ensemble, teachers) for name, ensemble in ensembles.items()]
    checks += [partial(_require_labels, name, ensemble) for name, ensemble in ensembles.items() if not labelled]
    raise_all(caught(*checks))
    first = {name: (ensemble.teachers or tuple(teachers))[0] for name, ensemble in ensembles.items()}
    return {**teachers, **{name: teachers[member] for name, member in first.items()}}


def _require_labels(name: str, ensemble: Ensemble) -> None:
    if ensemble.needs_labels:
        raise RecipeError(
            f"ensembles.{name} ({ensemble.kind}) needs labels of one class, the cache's images have none. "
            "Fix: kind: by_entropy"
        )


def _require_members(name: str, ensemble: Ensemble, teachers: Mapping[str, int]) -> None:
    known, members = sorted(teachers), ensemble.teachers or tuple(teachers)
    if name in teachers:
        raise RecipeError(f"ensembles.{name}: the cache has a teacher of that name. Fix: a name apart from {known}")
    if unknown := sorted(set(members) - teachers.keys()):
        raise RecipeError(f"ensembles.{name} is made of {unknown}, the cache has {known}. Fix: name these")
    if len(set(members)) < max(2, len(members)):
        raise RecipeError(f"ensembles.{name} is made of {list(members)}. Fix: at least two teachers, each once")
    counts = {member: teachers[member] for member in members}
    if len(set(counts.values())) > 1:
        raise MismatchError(
            f"ensembles.{name}: the members have different numbers of classes: {counts}. Fix: `teachers` that agree"
        )
