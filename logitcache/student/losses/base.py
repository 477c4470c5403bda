"""What losses share: the class that the training loop calls, what it is given, and sums over rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, ClassVar, Concatenate, Literal, ParamSpec

import torch
from pydantic import Field
from torch import Tensor, nn

from logitcache.config.recipe import Component, Name
from logitcache.errors import RecipeError
from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureKind, FeatureShape
from logitcache.student.optim.schedules import Context as Context
from logitcache.student.optim.schedules import Schedule, TemperatureBase, Weight, constant
from logitcache.targets import Batch, MixedLabels, Targets

P = ParamSpec("P")

LossWeight = Annotated[
    Weight,
    Field(
        description="Weight of the loss in the sum of all losses: a number or a schedule, never below 0.",
        examples=[0.5, {"kind": "warm_up", "value": 1, "epochs": 20}],
    ),
]
LossTeacher = Annotated[
    Name | None,
    Field(
        description="Teacher of the cache, or ensemble, to learn from; needed only if there are several.",
        examples=["resnet50"],
    ),
]

UNLABELLED = -1
FIX_OF_ONE_CLASS = "Fix: multi_label_kl on the teacher's logits, or binary_cross_entropy on labels [B, C] of 0 and 1"

Need = Literal["labels", "single labels", "multi labels", "logits", "raw logits", "head"]
"""What a loss needs.

labels: one class an image, also of mixed images
single labels: one class an image that is not mixed
multi labels: any number of classes an image
logits: the teacher's distribution
raw logits: its logits themselves, of whatever encoding
head: its last linear layer
"""


@dataclass(frozen=True)
class HeldTeacher:
    """What a cache stores of a teacher: its features' shapes, and W [C, D] and b [C] of its last linear layer, if any.

    A teacher without classes has only features.
    """

    num_classes: int | None
    features: Mapping[str, FeatureShape]
    head: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Site:
    """What a loss builds its adapter for: the shapes at the student's taps, without the batch, and the teachers.

    class_counts: labelled images of each class, int64 [C]; None if not known.
    """

    taps: Mapping[str, tuple[int, ...]]
    teachers: Mapping[str, HeldTeacher]
    num_images: int
    class_counts: Tensor | None = None

    def teacher(self, name: str | None) -> HeldTeacher:
        """Return the named teacher, or the only one."""
        return self.teachers[name or next(iter(self.teachers))]


class StepSums(nn.Module):
    """An adapter with sums over the rows of a step, in the buffers that `sums` names; ranks add theirs up."""

    sums: ClassVar[tuple[str, ...]] = ()


class LossBase(Component, ABC):
    """A loss: an entry of `losses` that the training loop calls with outputs and batch.

    A subclass sets the class variables that differ from these defaults:

    variable        default   meaning
    asks            nothing   what the loss needs of labels and logits, beside what its temperature needs
    by_row          True      a mean over rows: the parts of a batch sum to the whole
    min_rows        1         fewer rows leave nothing to compare
    exclusive       False     takes an image to be of one class, as a softmax does, which needs two classes or more
    differentiates  False     calls autograd on the student inside the loss: not possible with `compile: true`
    remembers_rows  False     the adapter stores something of every row, and one of several processes sees only a part
    terms           none      the fields that weigh the terms of a sum
    teacher         None      the teacher whose answers it takes; mostly a field, None for the only one
    weight          1         the factor of the loss; mostly a field
    kinds           pooled,   of a FeatureLoss: the kinds of the teacher's feature that it takes
                    maps
    """

    asks: ClassVar[frozenset[Need]] = frozenset()
    by_row: ClassVar[bool] = True
    min_rows: ClassVar[int] = 1
    exclusive: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False
    remembers_rows: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Complete a loss that has no `teacher` or no `weight`, as the table states."""
        for name, value in (("teacher", None), ("weight", constant(1.0))):
            if "kind" in cls.model_fields and name not in cls.model_fields and not hasattr(cls, name):
                setattr(cls, name, value)

    @abstractmethod
    def __call__(self, outputs: Targets, batch: Batch, context: Context) -> Tensor:
        """Return the unweighted loss of a batch, a scalar, at least float32.

        `outputs` are the student's: logits [B, C], and features by tap as its modules return them.
        """

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss needs of its data."""
        return self.asks.union(*(value.needs for _, value in self if isinstance(value, TemperatureBase)))

    def idle(self, epochs: float) -> str | None:
        """Return why the loss trains nothing."""
        weights = {name for name, value in self if isinstance(value, Schedule) and value.bounds[1] == 0}
        if "weight" in weights or (self.terms and weights.issuperset(self.terms)):
            zero = ["weight"] if "weight" in weights else self.terms
            return f"has {' and '.join(zero)} 0 at all times and trains nothing. Fix: raise it, or leave the loss out"
        return None

    def in_effect(self, context: Context) -> dict[str, float]:
        """Return the weights and temperatures of a step, by field; temperatures by row are left out."""
        found = {name: value.in_effect(context) for name, value in self if isinstance(value, TemperatureBase)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's taps that the loss reads."""
        return ()

    @property
    def features(self) -> Mapping[str, tuple[FeatureKind, ...]]:
        """The teacher's features that the loss reads, and the kinds of each that it takes."""
        return {}

    def adapter(self, site: Site) -> nn.Module:
        """Build what the loss trains beside the student, or remembers from step to step."""
        return nn.Identity()

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that the loss is a mean over, on the device of the batch."""
        return torch.full((), len(batch), device=batch.labels.device)


class FeatureLoss(LossBase, ABC):
    """A loss that compares a tap of the student with a feature of a teacher."""

    kinds: ClassVar[tuple[FeatureKind, ...]] = ("pooled", "maps")

    kind: str
    student: str = Field(
        description="Tap of the student: the path of a module, as in `named_modules`; with the suffix `:input`, its "
        "input.",
        examples=["layer4"],
    )
    feature: Name = Field(
        description="Feature of the teacher, by its name in the precompute recipe.", examples=["pooled"]
    )
    teacher: LossTeacher = None
    weight: LossWeight = constant(1.0)

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's tap."""
        return (self.student,)

    @property
    def features(self) -> Mapping[str, tuple[FeatureKind, ...]]:
        """The teacher's feature, and the kinds of it that the loss takes."""
        return {self.feature: self.kinds}

    def compared(self, outputs: Targets, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the student's features and the teacher's, at least float32."""
        teacher = targets_of(batch.teachers, self.teacher).features[self.feature]
        return at_least_float32(outputs.features[self.student]), at_least_float32(teacher)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], FeatureShape]:
        """Return the shape at the student's tap, without the batch, and the teacher's feature."""
        return site.taps[self.student], site.teacher(self.teacher).features[self.feature]


def full_precision(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Compute a function of tensors in their own precision, also under autocast."""

    @wraps(function)
    def computed(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return computed


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


def known_labels(labels: Tensor, mixed: MixedLabels | None = None) -> Tensor:
    """Return which labels, of the image and of its partner if mixed, are known; bool, in the shape of `labels`."""
    own = labels != UNLABELLED
    return own if mixed is None else own & (mixed.partners != UNLABELLED)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the values that count, a mask of their shape; 0 if none does."""
    return values.where(counted, 0).sum() / counted.sum().clamp(min=1).to(values.dtype)


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
