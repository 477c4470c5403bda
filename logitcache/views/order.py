"""The order of an epoch, and partners of images: pure functions of sizes, seed and epoch or view.

In each view a keyed permutation E lays the images out in places, and the images in places 2t and 2t + 1 are partners:
an involution that any process can look up for any image. E is a generalised Feistel network over a grid that just holds
the images, walked along its cycle until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002): E and its inverse take no memory, and hardly ever a second step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.views.keys import Draws, Words, order_words, permutation

T = TypeVar("T")
Ints = NDArray[np.int64]

NUM_ROUNDS = 6

MIN_SIDE = 3  # of the grid: smaller ones would favour some pairs


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


class Pairing(NamedTuple):
    """Partners within windows of `window` consecutive images; of a window of odd size one image stays alone."""

    seed: int
    num_images: int
    window: int

    def partners(self, views: Ints, indices: Ints) -> Ints:
        """Return the partner of each image [B] in its view; an image that stays alone is its own."""
        starts, counts = self._windows(indices)
        places = self.places(views, indices) - starts
        beside = np.where(places ^ 1 < counts, places ^ 1, places)
        return self.images(views, starts + beside)

    def images(self, views: Ints, places: Ints) -> Ints:
        """Return the images [B] in the given places of their views: E itself."""
        return self._permuted(views, places, forwards=True)

    def places(self, views: Ints, indices: Ints) -> Ints:
        """Return the places [B] of the given images in their views: the inverse of E."""
        return self._permuted(views, indices, forwards=False)

    def _windows(self, indices: Ints) -> tuple[Ints, Ints]:
        """Return the first image and the number of images of each one's window."""
        starts = indices - indices % self.window
        return starts, np.minimum(self.window, self.num_images - starts)

    def _permuted(self, views: Ints, numbers: Ints, *, forwards: bool) -> Ints:
        """Apply E or its inverse, whose keys are those of a view and a window, however many images ask."""
        starts, counts = self._windows(numbers)
        named = np.stack([views, starts], axis=1)
        if (named == named[0]).all():
            named = named[:1]
        draws = Draws(self.seed, named[:, 0].astype(np.uint64), named[:, 1].astype(np.uint64))
        keys = draws.words("pair", 0, NUM_ROUNDS).T
        return starts + _walk(numbers - starts, counts, keys, forwards=forwards)


def _walk(places: Ints, counts: Ints, keys: Words, *, forwards: bool) -> Ints:
    """Permute places [B], each within its own count, until all have landed inside."""
    rows = np.maximum(np.ceil(np.sqrt(counts)), MIN_SIDE).astype(np.uint64)
    columns = np.maximum(-(-counts // rows.astype(np.int64)), MIN_SIDE).astype(np.uint64)
    keys = np.broadcast_to(keys, (len(keys), len(places)))
    found, inside = places.astype(np.uint64), counts.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        found[outside] = _feistel(found[outside], rows[outside], columns[outside], keys[:, outside], forwards)
        outside = outside[found[outside] >= inside[outside]]
    return found.astype(np.int64)


def _feistel(values: Words, rows: Words, columns: Words, keys: Words, forwards: bool) -> Words:
    """Permute 0..rows × columns - 1: shift the row by a hash of the column, then the column by one of the row."""
    row, column = values // columns, values % columns
    rounds = range(NUM_ROUNDS) if forwards else reversed(range(NUM_ROUNDS))
    for number in rounds:
        still, moving, size = (column, row, rows) if number % 2 == 0 else (row, column, columns)
        shift = _scrambled(still, keys[number]) % size
        moved = (moving + (shift if forwards else size - shift)) % size
        row, column = (moved, column) if number % 2 == 0 else (row, moved)
    return row * columns + column


def _scrambled(half: Words, key: Words) -> Words:
    """Return a keyed hash, 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    mixed = half << np.uint64(32) | key
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
