"""Targets: the teachers' answers for a batch, read from a cache or computed by live teachers."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from logitcache.logits import BatchValue, Logits, at_least_float32, log_probs, mapped


@dataclass(frozen=True)
class CompactFeature(BatchValue):
    """A feature, in the arrays of an encoding, decoded when it is first read.

    rows: arrays [B, ...] by name; decode: turns them into features, float32 [B, *shape], on their device.
    """

    rows: Mapping[str, Tensor]
    shape: tuple[int, ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]

    @cached_property
    def values(self) -> Tensor:
        """The feature, float32 [B, *shape]."""
        return self.decode(self.rows)


FeatureValues = Tensor | CompactFeature


def feature_values(feature: FeatureValues) -> Tensor:
    """Return a feature [B, *shape], at least in float32."""
    return at_least_float32(feature if isinstance(feature, Tensor) else feature.values)


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
class Targets(BatchValue):
    """One teacher's targets for a batch: tensors, whatever their encoding.

    compact, compact_features: the encoded forms, which are small to move and to slice; each is decoded once, when its
    tensor is first read, on the device where it is. A tensor is its own compact form.
    """

    compact: Logits
    compact_features: Mapping[str, FeatureValues] = field(default_factory=dict)
    _log_probs: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def logits(self) -> Tensor:
        """The teacher's logits [B, C], a float tensor.

        If the encoding keeps no logits (top-k, mixed targets, ensembles; `keeps_logits` is False), they are log p at T
        = 1. Dividing these by another T does not give the distribution at T; use `log_probs(T)`.
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

        Correct for every encoding. The distribution at one temperature is computed once, also for several losses.
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


@dataclass(frozen=True)
class MixedLabels(BatchValue):
    """Labels of mixed images: the partners' labels, like the own ones, and the weight of the own ones, float32 [B]."""

    partners: Tensor
    share: Tensor


@dataclass(frozen=True)
class Batch(BatchValue):
    """Images uint8 [B, C, H, W], labels int64 [B] (-1: unlabelled), keys int64 [B, 2], and targets by teacher.

    Multi-label targets are int8 [B, C]: 1 if the class is present, 0 if it is absent, -1 if unknown. If images are
    mixed with partners, `mixed` has the partners' labels and the weights.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    teachers: Mapping[str, Targets]
    mixed: MixedLabels | None = None
    _parts: dict[int, tuple["Batch", ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def parts(self, count: int) -> tuple["Batch", ...]:
        """Cut into at most so many parts; what one student's losses decode of a part, another's find decoded."""
        if count == 1:
            return (self,)
        if count not in self._parts:
            size = -(-len(self) // count)
            self._parts[count] = tuple(self[slice(start, start + size)] for start in range(0, len(self), size))
        return self._parts[count]

    def split(self, lengths: Sequence[int]) -> Iterator["Batch"]:
        """Cut into parts of so many rows."""
        if len(lengths) == 1:
            yield self
            return
        stops = itertools.accumulate(lengths)
        for length, stop in zip(lengths, stops, strict=True):
            yield self[slice(stop - length, stop)]

    @property
    def targets(self) -> Targets:
        """The targets of the only teacher."""
        if len(self.teachers) != 1:
            names = sorted(self.teachers)
            raise ValueError(f"the batch has targets of {names}: take one, as in batch.teachers['name']")
        return next(iter(self.teachers.values()))

    @property
    def target_bytes(self) -> int:
        """Bytes of the teachers' targets in their encoded forms."""
        kept: list[Tensor] = []

        def collected(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        mapped(self.teachers, collected)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def __len__(self) -> int:
        return len(self.images)
