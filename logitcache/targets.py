"""`Targets`: a teacher's answers for a batch, read from a cache or computed by the live teacher."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from logitcache.logits import Logits, at_least_float32, log_probs, moved
from logitcache.runtime.device import to_device


@dataclass(frozen=True)
class CompactFeature:
    """A feature, kept in the arrays of an encoding until it is asked for.

    rows: arrays [B, ...] by name; decode: turns them into features, float32 [B, *shape], on the device where they are.
    """

    rows: Mapping[str, Tensor]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]

    @cached_property
    def values(self) -> Tensor:
        """The feature, float32 [B, *shape]."""
        return self.decode(self.rows)

    def to(self, device: torch.device) -> Self:
        """Move to a device without waiting for the copies."""
        return replace(self, rows={name: to_device(values, device) for name, values in self.rows.items()})

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""
        return replace(self, rows={name: values[rows] for name, values in self.rows.items()})


FeatureValues = Tensor | CompactFeature


def feature_values(feature: FeatureValues) -> Tensor:
    """Return a feature [B, *shape], at least in float32."""
    return at_least_float32(feature if isinstance(feature, Tensor) else feature.values)


def _feature_moved(feature: FeatureValues, device: torch.device) -> FeatureValues:
    return to_device(feature, device) if isinstance(feature, Tensor) else feature.to(device)


class _Features(Mapping[str, Tensor]):
    """Features by name; a compact one is decoded when it is first read."""

    def __init__(self, compact: Mapping[str, FeatureValues]) -> None:
        self._compact = compact

    def __getitem__(self, name: str) -> Tensor:
        value = self._compact[name]
        return value if isinstance(value, Tensor) else value.values

    def __iter__(self) -> Iterator[str]:
        return iter(self._compact)

    def __len__(self) -> int:
        return len(self._compact)


@dataclass(frozen=True)
class Targets:
    """One teacher's answers for a batch: tensors, whatever the form in which they are kept.

    compact, compact_features: the kept forms, which are small to move and to cut; each is decoded once, when its tensor
    is first read, on the device where it is. A tensor is its own compact form.
    """

    compact: Logits
    compact_features: Mapping[str, FeatureValues] = field(default_factory=dict)
    _log_probs: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def logits(self) -> Tensor:
        """The teacher's logits [B, C], a float tensor.

        Of a form that keeps no logits (top-k, mixed answers, ensembles; `keeps_logits` is False) they are log p at
        T = 1: divided by another T that is not the distribution at T, `log_probs(T)` is.
        """
        return self.compact if isinstance(self.compact, Tensor) else self.compact.logits

    @property
    def keeps_logits(self) -> bool:
        """Whether `logits` are the teacher's own, not log-probabilities."""
        return isinstance(self.compact, Tensor) or self.compact.keeps_logits

    @property
    def num_classes(self) -> int:
        """Classes of the distribution; 0 if only features are kept."""
        return self.compact.shape[1] if isinstance(self.compact, Tensor) else self.compact.num_classes

    def log_probs(self, temperature: float | Tensor = 1.0) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C], of one temperature or one for each row [B].

        Right for every form. The distribution at a number is computed once, also for several losses.
        """
        if isinstance(temperature, Tensor):
            return log_probs(self.compact, temperature)
        if temperature not in self._log_probs:
            self._log_probs[temperature] = log_probs(self.compact, temperature)
        return self._log_probs[temperature]

    @property
    def features(self) -> Mapping[str, Tensor]:
        """Features [B, ...] by name, float tensors."""
        return _Features(self.compact_features)

    def to(self, device: torch.device | str) -> "Targets":
        """Move to a device without waiting for the copies: the compact forms, which are decoded there."""
        where = torch.device(device)
        features = {name: _feature_moved(value, where) for name, value in self.compact_features.items()}
        return Targets(moved(self.compact, where), features)

    def __getitem__(self, rows: slice) -> "Targets":
        """Take some rows of the batch."""
        return Targets(self.compact[rows], {name: value[rows] for name, value in self.compact_features.items()})


@dataclass(frozen=True)
class MixedLabels:
    """What mixing made of labels: the partners' labels, like the own ones, and the weight of these, float32 [B]."""

    partners: Tensor
    share: Tensor

    def to(self, device: torch.device) -> "MixedLabels":
        """Move to a device without waiting for the copies."""
        return MixedLabels(to_device(self.partners, device), to_device(self.share, device))

    def __getitem__(self, rows: slice) -> "MixedLabels":
        """Take some rows of the batch."""
        return MixedLabels(self.partners[rows], self.share[rows])


@dataclass(frozen=True)
class Batch:
    """Images uint8 [B, C, H, W], labels int64 [B] (-1: unlabelled), keys int64 [B, 2], and targets by teacher.

    Labels of any number of classes an image are int8 [B, C]: 1 for a class that is there, 0 for one that is not, -1
    where that is unknown. Where images are mixed with partners, `mixed` says what that makes of the labels.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    teachers: Mapping[str, Targets]
    mixed: MixedLabels | None = None

    @property
    def targets(self) -> Targets:
        """The targets of the only teacher."""
        if len(self.teachers) != 1:
            names = sorted(self.teachers)
            raise ValueError(f"the batch has targets of {names}: take one, as in batch.teachers['name']")
        return next(iter(self.teachers.values()))

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Batch":
        """Move to a device without waiting for the copies."""
        where = torch.device(device)
        return Batch(
            to_device(self.images, where),
            to_device(self.labels, where),
            to_device(self.keys, where),
            {name: targets.to(where) for name, targets in self.teachers.items()},
            None if self.mixed is None else self.mixed.to(where),
        )

    def __getitem__(self, rows: slice) -> "Batch":
        """Take some rows of the batch."""
        teachers = {name: targets[rows] for name, targets in self.teachers.items()}
        mixed = None if self.mixed is None else self.mixed[rows]
        return Batch(self.images[rows], self.labels[rows], self.keys[rows], teachers, mixed)
