"""What every loss shares."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from logitcache.config.recipe import Component
from logitcache.errors import RecipeError
from logitcache.reductions import FeatureKind, FeatureShape
from logitcache.student.optim.progress import Progress
from logitcache.student.optim.schedules import Schedule, TemperatureBase
from logitcache.targets import Batch, Targets

UNLABELLED = -1
FIX_OF_ONE_CLASS = "Fix: multi_label_kl on the teacher's logits, or binary_cross_entropy on labels [B, C] of 0 and 1"

Need = Literal["labels", "single labels", "multi labels", "logits", "dense logits", "head"]
"""What a loss asks for: one class an image, perhaps mixed; one that is not mixed; labels of any number of classes an
image; the teacher's distribution; its raw logits; its last linear layer."""


@dataclass(frozen=True)
class HeldTeacher:
    """What a cache holds of a teacher: its features' shapes, and W [C, D] and b [C] of its last linear layer, if kept.

    Without classes it answers with features alone.
    """

    num_classes: int | None
    features: Mapping[str, FeatureShape]
    head: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """Where a loss is put to work: shapes at the student's taps, without the batch, the teachers, how many images.

    class_counts: labelled images of each class, int64 [C]; None where that is not known.
    """

    taps: Mapping[str, tuple[int, ...]]
    teachers: Mapping[str, HeldTeacher]
    num_images: int
    class_counts: Tensor | None = None


class StepSums(nn.Module):
    """An adapter with sums over the rows of a step, in buffers that `sums` names: several processes add theirs up."""

    sums: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Context:
    """What a loss is given beside outputs and batch: the module that it built for itself, and where training stands."""

    adapter: nn.Module
    progress: Progress


class LossBase(Component, ABC):
    """What the training loop asks of a loss, beside its fields.

    `by_row` says whether the loss is a mean over rows, so that the parts of a batch sum to the whole; `min_rows` from
    how many rows on it says anything, as fewer leave it nothing to compare; `differentiates` whether it takes gradients
    of its own through the student, which a compiled one does not give; `remembers_rows` whether its adapter keeps
    something of every row that it saw, which is more than one of several processes sees; `exclusive` whether it takes
    an image to be of one class alone, as a softmax does, which needs two classes or more; `terms` the fields that weigh
    what it is a sum of.
    """

    by_row: ClassVar[bool] = True
    min_rows: ClassVar[int] = 1
    differentiates: ClassVar[bool] = False
    remembers_rows: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch, a scalar, at least float32.

        `outputs` are the student's: logits [B, C], and features by tap as its modules gave them.
        """

    def idle(self, epochs: float) -> str | None:
        """Return why the loss trains nothing."""
        weights = {name: value for name, value in self if isinstance(value, Schedule) and value.highest == 0}
        if "weight" in weights or (self.terms and weights.keys() >= set(self.terms)):
            zero = ["weight"] if "weight" in weights else self.terms
            return f"has {' and '.join(zero)} 0 at all times and trains nothing. Fix: raise it, or leave the loss out"
        return None

    def in_effect(self, context: Context) -> dict[str, float]:
        """Return the weights and temperatures of a step, by field; those that each row has of its own are left out."""
        found = {name: value.in_effect(context) for name, value in self if isinstance(value, TemperatureBase)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's taps that the loss looks at."""
        return ()

    @property
    def features(self) -> Mapping[str, tuple[FeatureKind, ...]]:
        """The teacher's features that the loss looks at, and the kinds of each that will do."""
        return {}

    def adapter(self, site: Site) -> nn.Module:
        """Build what the loss trains beside the student, or remembers from step to step."""
        return nn.Identity()

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over."""
        return every_row(batch)


def targets_of(teachers: Mapping[str, Targets], name: str | None) -> Targets:
    """Return the targets of the named teacher, or of the only one."""
    if name is None and len(teachers) == 1:
        return next(iter(teachers.values()))
    if name is None or name not in teachers:
        raise RecipeError(
            f"a loss asks for teacher {name!r}; the cache has {sorted(teachers)}. Fix: set the loss's `teacher`"
        )
    return teachers[name]


def require_classes(logits: Tensor) -> None:
    """Raise RecipeError for logits [B, C] of fewer than two classes: their softmax is 1, and trains nothing."""
    if logits.shape[1] < 2:
        raise RecipeError(f"a softmax over {logits.shape[1]} class is constant and trains nothing. {FIX_OF_ONE_CLASS}")


def every_row(batch: Batch) -> Tensor:
    """Count the rows of a batch, on its device: the `rows` of a loss that is a mean over all of them."""
    return torch.full((), len(batch), device=batch.labels.device)


def mean_of_labelled(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of values [B] over the rows that have a label, 0 where none has."""
    known = labels != UNLABELLED
    return rows.where(known, 0).sum() / known.sum().clamp(min=1).to(rows.dtype)


def split_by_label(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split log-probabilities [B, C] into the label's [B], that of all others together [B], and theirs alone [B, C].

    The last is a distribution over the other classes, -inf at the label; of rows without a label the first class
    stands for it.
    """
    place = labels.clamp(min=0)[:, None]
    others = log_p.scatter(1, place, -torch.inf)
    rest = others.logsumexp(dim=1)
    return log_p.gather(1, place)[:, 0], rest, others - rest[:, None]


def cross(p: Tensor, log_q: Tensor) -> Tensor:
    """Return Σ p log q over classes, [B], with 0 log 0 = 0."""
    return (p * log_q.where(p > 0, 0)).sum(dim=1)
