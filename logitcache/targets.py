"""`Targets`: what a teacher says of a batch, whether it came from a cache or from the live teacher."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from logitcache.device import to_device


class EncodedLogits(Protocol):
    """A distribution over classes kept in fewer numbers than classes."""

    @property
    def num_classes(self) -> int:
        """Classes of the full distribution."""

    def log_probs(self, temperature: float) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]."""

    def to(self, device: torch.device) -> Self:
        """Move to a device without waiting for the copy."""

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""


Logits = Tensor | EncodedLogits


def at_least_float32(values: Tensor) -> Tensor:
    """Return float16 and bfloat16 values in float32; float64 stays, for checks of gradients."""
    return values if values.dtype == torch.float64 else values.float()


def log_probs(logits: Logits, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature), [B, C], of a tensor [B, C] or an encoded form; at least in float32."""
    if isinstance(logits, Tensor):
        return torch.log_softmax(at_least_float32(logits) / temperature, dim=1)
    return logits.log_probs(temperature)


def dense_logits(logits: Logits) -> Tensor:
    """Return all logits [B, C]; raise TypeError for an encoded form that has only a distribution."""
    if isinstance(logits, CompactLogits):
        return logits.logits
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"{type(logits).__name__} holds a distribution, not its logits")


def top1(logits: Logits) -> Tensor:
    """Return the most probable class of each row, int64 [B]."""
    return (logits if isinstance(logits, Tensor) else logits.log_probs(1.0)).argmax(dim=1)


@dataclass(frozen=True)
class TopKLogits:
    """The k largest log-probabilities, and what is known of the rest.

    log_p: [B, k] descending; index: int64-able [B, k]; tail: [B, 3], of the C - k dropped log-probabilities the log of
    their total probability, their mean and their variance.
    """

    log_p: Tensor
    index: Tensor
    tail: Tensor
    num_classes: int

    def log_probs(self, temperature: float) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]; the tail's mass is spread evenly.

        With s = 1/T the tail's log mean exp(s x) is its cumulant function K(s), which is convex. K(0) = 0, K'(0) =
        mean, K''(0) = variance and K(1) are stored. For s ≤ 1 it is the cubic through them, held between s·mean and
        s·K(1): exact at T = 1, and to second order at high T. For s > 1 it is the tangent at 1, whose slope is the
        cubic's, held between K(1) and the smallest kept, as no x is larger.
        """
        s = 1.0 / temperature
        kept = self.log_p.float() * s
        num_dropped = self.num_classes - kept.shape[1]
        if num_dropped == 0:
            scores = torch.empty(len(kept), self.num_classes, device=kept.device)
        else:
            log_mass, mean, variance = self.tail.float().unbind(1)
            at_one = log_mass - math.log(num_dropped)
            if s <= 1:
                cubic = s * mean + s**2 * variance / 2 + s**3 * (at_one - mean - variance / 2)
                tail = torch.minimum(torch.maximum(cubic, s * mean), s * at_one)
            else:
                slope = 3 * at_one - 2 * mean - variance / 2
                smallest = self.log_p[:, -1].float()
                tail = at_one + (s - 1) * torch.minimum(torch.maximum(slope, at_one), smallest)
            scores = tail[:, None].expand(-1, self.num_classes).clone()
        return torch.log_softmax(scores.scatter_(1, self.index.long(), kept), dim=1)

    def to(self, device: torch.device) -> Self:
        """Move to a device without waiting for the copy."""
        return replace(
            self,
            log_p=to_device(self.log_p, device),
            index=to_device(self.index, device),
            tail=to_device(self.tail, device),
        )

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""
        return replace(self, log_p=self.log_p[rows], index=self.index[rows], tail=self.tail[rows])


@dataclass(frozen=True)
class CompactLogits:
    """Every logit, kept in the arrays of an encoding until it is asked for.

    rows: arrays [B, ...] by name; decode: turns them into logits, float32 [B, num_classes], on the device where they
    are. Decoded once, by whoever asks first.
    """

    rows: Mapping[str, Tensor]
    num_classes: int
    decode: Callable[[Mapping[str, Tensor]], Tensor]

    @cached_property
    def logits(self) -> Tensor:
        """The logits, float32 [B, C]."""
        return self.decode(self.rows)

    def log_probs(self, temperature: float) -> Tensor:
        """Return log softmax(z / temperature), float32 [B, C]."""
        return torch.log_softmax(self.logits / temperature, dim=1)

    def to(self, device: torch.device) -> Self:
        """Move to a device without waiting for the copies."""
        return replace(self, rows={name: to_device(values, device) for name, values in self.rows.items()})

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""
        return replace(self, rows={name: values[rows] for name, values in self.rows.items()})


@dataclass(frozen=True)
class LinearLogits:
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

    def log_probs(self, temperature: float) -> Tensor:
        """Return the log of the mixed probabilities, float32 [B, C]."""
        share = self.share[:, None]
        own = share.log() + log_probs(self.own, temperature)
        return torch.logaddexp(own, torch.log1p(-share) + log_probs(self.partner, temperature))

    def to(self, device: torch.device) -> Self:
        """Move to a device without waiting for the copies."""
        return replace(
            self,
            own=_moved(self.own, device),
            partner=_moved(self.partner, device),
            share=to_device(self.share, device),
        )

    def __getitem__(self, rows: slice) -> Self:
        """Take some rows of the batch."""
        return replace(self, own=self.own[rows], partner=self.partner[rows], share=self.share[rows])


def _moved(logits: Logits, device: torch.device) -> Logits:
    return to_device(logits, device) if isinstance(logits, Tensor) else logits.to(device)


@dataclass(frozen=True)
class Targets:
    """One teacher's answers for a batch: logits [B, C], and features by name."""

    logits: Logits
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Targets":
        """Move to a device without waiting for the copies."""
        return Targets(
            _moved(self.logits, device), {name: to_device(value, device) for name, value in self.features.items()}
        )

    def __getitem__(self, rows: slice) -> "Targets":
        """Take some rows of the batch."""
        return Targets(self.logits[rows], {name: value[rows] for name, value in self.features.items()})


@dataclass(frozen=True)
class MixedLabels:
    """What mixing made of labels: the partners' labels, int64 [B], and the weight of the own ones, float32 [B]."""

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

    Where images are mixed with partners, `mixed` says what that makes of the labels.
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
            raise ValueError(
                f"the batch has targets of {sorted(self.teachers)}: take one, as in batch.teachers['name']"
            )
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
