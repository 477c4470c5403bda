"""The order of an epoch: a pure function of sizes, seed and epoch."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.views.keys import Draws, Ints, bernoulli, order_words, permutation

T = TypeVar("T")
_BLOCK = 1 << 16  # images drawn at a time: the rounds of Philox take many times their memory


class Drawn(Protocol):
    """Numbers of an epoch, in order, by slices."""

    def __getitem__(self, places: slice, /) -> NDArray[np.integer[Any]]: ...


class EpochOrder:
    """The places of an epoch in order, a permutation of range(num_images), of which slices are drawn.

    With `block`, places are shuffled within runs of `block` consecutive ones, and the runs are shuffled: rows that must
    be decoded together are then used together; of these only the runs of a slice are in memory. Runs of `unit` places
    stay together, as those of a pair do, and begin at multiples of `unit`: one that is short comes last.
    """

    def __init__(self, num_images: int, seed: int, epoch: int, block: int | None = None, unit: int = 1) -> None:
        self._num_images, self._unit = num_images, unit
        self._num_units = num_images // unit
        block = None if block is None else block // unit
        self._units: Drawn
        if block is None or block >= self._num_units:
            self._units = permutation(seed, epoch, self._num_units)
        else:
            self._units = _Runs(self._num_units, seed, epoch, block)

    def __getitem__(self, places: slice) -> Ints:
        """Return the places of a slice of an epoch; its step is 1."""
        start, stop, _ = places.indices(self._num_images)
        first = min(start // self._unit, self._num_units)
        units = self._units[first : -(-stop // self._unit)].astype(np.int64)
        drawn = (units[:, None] * self._unit + np.arange(self._unit)).ravel()
        rest = np.arange(self._num_units * self._unit, self._num_images)
        return np.append(drawn, rest)[start - first * self._unit : stop - first * self._unit]


def held_out(count: int, share: float) -> NDArray[np.bool_]:
    """Return which of `count` images are held out from learning, [count]: each with a probability of `share`.

    Whether an image is depends on its index alone: it stays so in every run, and if images are added.
    """
    held = np.empty(count, np.bool_)
    for start in range(0, count, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, count), dtype=np.uint64)
        words = Draws(0, np.zeros_like(indices), indices).words("held_out", 0, 1)
        held[start : start + _BLOCK] = bernoulli(words[:, 0], share)
    return held


class _Runs:
    """Runs of `block` consecutive places, shuffled, and the places in each: those of the last slice are kept."""

    def __init__(self, count: int, seed: int, epoch: int, block: int) -> None:
        self._count, self._seed, self._epoch, self._block = count, seed, epoch, block
        self._runs = permutation(seed ^ 1, epoch, -(-count // block)).astype(np.int64)
        self._stops = np.cumsum(self._sizes(self._runs))
        self._kept = (0, 0, self._runs[:0])

    def __getitem__(self, places: slice) -> Ints:
        start, stop, _ = places.indices(self._count)
        if start >= stop:
            return self._runs[:0]
        first, last, drawn = self._kept
        if not first <= start <= stop <= last:
            first, last, drawn = self._kept = self._draw(start, stop)
        return drawn[start - first : stop - first]

    def _draw(self, start: int, stop: int) -> tuple[int, int, Ints]:
        """Draw the runs that a slice touches; returns which slice they are themselves."""
        numbers = np.arange(np.searchsorted(self._stops, start, "right"), np.searchsorted(self._stops, stop) + 1)
        runs = self._runs[numbers]
        sizes, stops = self._sizes(runs), self._stops[numbers]
        first = int(stops[0] - sizes[0])
        images = np.repeat(runs * self._block - (stops - sizes), sizes) + np.arange(first, stops[-1])
        order = np.lexsort((order_words(self._seed, self._epoch, images), np.repeat(numbers, sizes)))
        return first, int(stops[-1]), images[order]

    def _sizes(self, runs: Ints) -> Ints:
        return np.minimum(self._block, self._count - runs * self._block)


def block_ranks(num_images: int, seed: int, epoch: int, block: int) -> Ints:
    """Return the place in an epoch of each run of `block` consecutive images."""
    return np.argsort(permutation(seed ^ 1, epoch, -(-num_images // block)), kind="stable")


def share_of(items: Sequence[T], rank: int, world_size: int, unit: int = 1) -> Sequence[T]:
    """Return the part of a batch that falls to one of `world_size` processes.

    The parts are consecutive, differ in size by one unit at most, and cut no run of `unit` items.
    """
    num_units = -(-len(items) // unit)
    start, stop = (num_units * place // world_size * unit for place in (rank, rank + 1))
    return items[start:stop]
