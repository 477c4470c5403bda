"""What the losses share that compare a tap of the student with a feature of a teacher."""

from abc import ABC
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ClassVar, Concatenate, ParamSpec, Protocol

import torch
from torch import Tensor

from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureKind, FeatureShape
from logitcache.student.losses.base import HeldTeacher, LossBase, Site, targets_of
from logitcache.targets import Batch, Targets

P = ParamSpec("P")


class Pair(Protocol):
    """What names the two that are compared: a tap of the student, and a teacher's feature, of one of some kinds."""

    @property
    def kinds(self) -> tuple[FeatureKind, ...]: ...
    @property
    def student(self) -> str: ...
    @property
    def feature(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...


class FeatureLoss(LossBase, ABC):
    """A loss with the fields of a `Pair`."""

    kinds: ClassVar[tuple[FeatureKind, ...]]

    @property
    def taps(self: Pair) -> tuple[str, ...]:
        """The student's tap."""
        return (self.student,)

    @property
    def features(self: Pair) -> Mapping[str, tuple[FeatureKind, ...]]:
        """The teacher's feature, and the kinds of it that will do."""
        return {self.feature: self.kinds}

    def compared(self: Pair, outputs: Targets, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the student's features and the teacher's, at least float32."""
        teacher = targets_of(batch.teachers, self.teacher).features[self.feature]
        return at_least_float32(outputs.features[self.student]), at_least_float32(teacher)

    def shapes(self: Pair, site: Site) -> tuple[tuple[int, ...], FeatureShape]:
        """Return the shape at the student's tap, without the batch, and what the teacher's feature is."""
        return site.taps[self.student], held_by(site, self.teacher).features[self.feature]


def held_by(site: Site, teacher: str | None) -> HeldTeacher:
    """Return what is held of the named teacher, or of the only one."""
    return site.teachers[teacher or next(iter(site.teachers))]


def full_precision(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Compute a function of tensors in the precision that they have, whatever autocast says."""

    @wraps(function)
    def computed(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return computed
