"""The order of an epoch: a pure function of sizes, seed and epoch."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.views.keys import permutation

T = TypeVar("T")


def epoch_order(num_images: int, seed: int, epoch: int, block: int | None = None, unit: int = 1) -> NDArray[np.int64]:
    """Return the places of an epoch in order, a permutation of range(num_images).

    With `block`, places are shuffled within runs of `block` consecutive ones, and the runs are shuffled: rows that must
    be decoded together are then used together. Runs of `unit` places stay together, as those of a pair do, and begin at
    multiples of `unit`: one that is short comes last.
    """
    if unit > 1:
        num_units, rest = divmod(num_images, unit)
        units = epoch_order(num_units, seed, epoch, None if block is None else block // unit)
        places = (units[:, None] * unit + np.arange(unit)).ravel()
        return np.append(places, np.arange(num_images - rest, num_images))
    if block is None or block >= num_images:
        return permutation(seed, epoch, num_images)
    shuffled = permutation(seed, epoch, num_images)
    return shuffled[np.argsort(block_ranks(num_images, seed, epoch, block)[shuffled // block], kind="stable")]


def block_ranks(num_images: int, seed: int, epoch: int, block: int) -> NDArray[np.int64]:
    """Return the place in an epoch of each run of `block` consecutive images."""
    return np.argsort(permutation(seed ^ 1, epoch, -(-num_images // block)), kind="stable")


def share_of(items: Sequence[T], rank: int, world_size: int, unit: int = 1) -> Sequence[T]:
    """Return the part of a batch that falls to one of `world_size` processes.

    The parts are consecutive, differ in size by one unit at most, and cut no run of `unit` items.
    """
    num_units = -(-len(items) // unit)
    start, stop = (num_units * place // world_size * unit for place in (rank, rank + 1))
    return items[start:stop]
