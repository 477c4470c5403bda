"""Logits and the forms in which they are stored: each gives its distribution at a temperature, on its device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import ClassVar, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.runtime.device import to_device

T = TypeVar("T")


class BatchValue:
    """A frozen dataclass of tensors [B, ...], also in mappings, tuples and other such values, all of one batch."""

    def to(self, device: torch.device | str) -> Self:
        """Move to a device without waiting for the copies."""
        where = torch.device(device)
        return mapped(self, lambda tensor: to_device(tensor, where))

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""
        return mapped(self, lambda tensor: tensor[rows])


def mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Apply a function to each tensor in a value; what holds none stays as it is."""
    changed: object = value
    if isinstance(value, Tensor):
        changed = change(value)
    elif isinstance(value, BatchValue):
        kind: type = type(value)
        # Not `replace`, whose checks take longer than to cut a small batch.
        changed = kind(*[mapped(getattr(value, name), change) for name in _field_names(kind)])
    elif isinstance(value, Mapping):
        changed = {name: mapped(item, change) for name, item in value.items()}
    elif isinstance(value, tuple):
        changed = tuple([mapped(item, change) for item in value])
    return cast(T, changed)


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    """Return the names of the fields that the constructor of a dataclass takes, in order."""
    return tuple(field.name for field in fields(kind) if field.init)


class EncodedLogits(Protocol):
    """A distribution over classes stored in fewer numbers than classes; a batch's `Targets` are one too."""

    @property
    def num_classes(self) -> int:
        """Classes of the full distribution."""

    @property
    def keeps_logits(self) -> bool:
        """Whether `logits` are the teacher's own, not log-probabilities."""

    @property
    def logits(self) -> Tensor:
        """The teacher's logits, float32 [B, C]; of a form that keeps a distribution alone, log p at T = 1."""

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C], of one temperature or one for each row [B]."""


Logits = Tensor | EncodedLogits


def at_least_float32(values: Tensor) -> Tensor:
    """Return float16 and bfloat16 values in float32; float64 stays, for checks of gradients."""
    return values if values.dtype == torch.float64 else values.float()


def log_probs(logits: Logits, temperature: float | Tensor = 1.0) -> Tensor:
    """Return log softmax(logits / temperature), [B, C], of a tensor [B, C] or an encoded form; at least in float32.

    `temperature`: one for all, a number or a scalar, or one for each row [B].
    """
    if not isinstance(logits, Tensor):
        return logits.log_probs(temperature)
    values = at_least_float32(logits)
    if not is_one(temperature):
        values = values / as_column(temperature, values)
    return torch.log_softmax(values, dim=1)


def is_one(factor: float | Tensor) -> bool:
    """Return whether a factor is the number 1, which changes no bit and would take time forwards and backwards."""
    return not isinstance(factor, Tensor) and factor == 1


def scaled(values: Tensor, factor: float | Tensor) -> Tensor:
    """Return values times a factor."""
    return values if is_one(factor) else factor * values


def as_column(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """Bring temperatures to [B, 1] or [1, 1] of the type of others; a number stays, and computes as numbers do."""
    return temperature.to(like).reshape(-1, 1) if isinstance(temperature, Tensor) else temperature


def dense_logits(logits: Logits) -> Tensor:
    """Return the teacher's own logits [B, C]; raise RecipeError for an encoded form that has only a distribution."""
    if isinstance(logits, Tensor):
        return logits
    values = logits.logits
    if not logits.keeps_logits:
        raise RecipeError(
            f"the teacher's logits are not kept, only a distribution over {logits.num_classes} classes (top-k, mixed "
            "answers or an ensemble). Fix: a loss of distributions, such as kl_divergence, or a cache that keeps every "
            "logit (kind: dense, uint8, transform or head)"
        )
    return values


def top1(logits: Logits) -> Tensor:
    """Return the most probable class of each row, int64 [B]."""
    return (logits if isinstance(logits, Tensor) else logits.log_probs(1.0)).argmax(dim=1)


class _Distribution(BatchValue, ABC):
    """A form that keeps no logits: log-probabilities stand for them, which are logits of the same distribution."""

    keeps_logits: ClassVar[bool] = False

    @abstractmethod
    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]."""

    @cached_property
    def logits(self) -> Tensor:
        """Log p at T = 1, float32 [B, C]: divided by another T it is not the distribution at T, `log_probs(T)` is."""
        return self.log_probs(1.0)


@dataclass(frozen=True)
class TopKLogits(_Distribution):
    """The k largest log-probabilities, and moments of the rest.

    log_p: [B, k] descending; index: int64-able [B, k]; tail: [B, 3], of the C - k dropped log-probabilities the log of
    their total probability, their mean and their variance.
    """

    log_p: Tensor
    index: Tensor
    tail: Tensor
    num_classes: int

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]; the tail's mass is spread evenly.

        With s = 1/T the tail's log mean exp(s x) is its cumulant function K(s), which is convex. K(0) = 0, K'(0) =
        mean, K''(0) = variance and K(1) are stored. For s ≤ 1 it is the cubic through them, held between s·mean and
        s·K(1): exact at T = 1, and to second order at high T. For s > 1 it is the tangent at 1, whose slope is the
        cubic's, held between K(1) and the smallest kept, as no x is larger.
        """
        kept = self.log_p.float()
        s = kept.new_ones(1, 1) / as_column(temperature, kept)
        num_dropped = self.num_classes - kept.shape[1]
        if num_dropped == 0:
            scores = torch.empty(len(kept), self.num_classes, device=kept.device)
        else:
            log_mass, mean, variance = self.tail.float()[:, :, None].unbind(1)
            at_one = log_mass - math.log(num_dropped)
            cubic = s * mean + s**2 * variance / 2 + s**3 * (at_one - mean - variance / 2)
            hot = torch.minimum(torch.maximum(cubic, s * mean), s * at_one)
            slope = 3 * at_one - 2 * mean - variance / 2
            cold = at_one + (s - 1) * torch.minimum(torch.maximum(slope, at_one), kept[:, -1:])
            scores = torch.where(s <= 1, hot, cold).expand(-1, self.num_classes).clone()
        return torch.log_softmax(scores.scatter_(1, self.index.long(), kept * s), dim=1)

    def wrong_row(self) -> int | None:
        """Return the first row on the CPU that names a class that does not exist; None if none does."""
        classes = self.index.numpy()
        if not classes.size or (classes.max() < self.num_classes and (classes.dtype.kind == "u" or classes.min() >= 0)):
            return None
        return int(((classes < 0) | (classes >= self.num_classes)).any(axis=1).argmax())


@dataclass(frozen=True)
class CompactLogits(BatchValue):
    """Every logit, in the arrays of an encoding, decoded when it is first read.

    rows: arrays [B, ...] by name; decode: turns them into logits, float32 [B, num_classes], on their
    device.
    """

    rows: Mapping[str, Tensor]
    num_classes: int
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    keeps_logits: ClassVar[bool] = True

    @cached_property
    def logits(self) -> Tensor:
        """The logits, float32 [B, C]."""
        return self.decode(self.rows)

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]."""
        return log_probs(self.logits, temperature)


@dataclass(frozen=True)
class NoLogits:
    """Stands for the logits of a teacher of which only features are kept."""

    num_classes: int = 0
    keeps_logits: ClassVar[bool] = False

    @property
    def logits(self) -> Tensor:
        """Raise RecipeError: there are none."""
        return self.log_probs(1.0)

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Raise RecipeError: there are none."""
        raise RecipeError("of this teacher only features are kept. Fix: a loss of features, or a teacher with logits")


NO_LOGITS = NoLogits()


@dataclass(frozen=True)
class LinearLogits(_Distribution):
    """The answers to two images, mixed in place of an answer to their mixture.

    own, partner: logits [B, C] or encoded forms; share: [B], the weight of `own`. The distribution at a temperature is
    the mixture of both distributions at that temperature.
    """

    own: Logits
    partner: Logits
    share: Tensor

    @property
    def num_classes(self) -> int:
        """Classes of the full distribution."""
        return self.own.shape[1] if isinstance(self.own, Tensor) else self.own.num_classes

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return the log of the mixed probabilities, float32 [B, C]."""
        share = self.share[:, None]
        own = share.log() + log_probs(self.own, temperature)
        return torch.logaddexp(own, torch.log1p(-share) + log_probs(self.partner, temperature))


@dataclass(frozen=True)
class EnsembleLogits(_Distribution):
    """A weighted mean of the distributions of several teachers, at whatever temperature it is asked for.

    members: logits [B, C] or encoded forms; weights: [B, M], each row of them sums to 1.
    """

    members: tuple[Logits, ...]
    weights: Tensor
    num_classes: int

    def log_probs(self, temperature: float | Tensor) -> Tensor:
        """Return the log of the mean of the members' softmax(z / temperature), float32 [B, C]."""
        found = torch.stack([log_probs(member, temperature) for member in self.members], dim=1)
        return torch.logsumexp(self.weights.log()[:, :, None] + found, dim=1)
