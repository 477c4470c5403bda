"""The order of an epoch: a pure function of sizes, seed and epoch."""

import numpy as np
from numpy.typing import NDArray

from logitcache.views.keys import permutation


def epoch_order(num_images: int, seed: int, epoch: int, block: int | None = None) -> NDArray[np.int64]:
    """Return the images of an epoch in order, a permutation of range(num_images).

    With `block`, images are shuffled within runs of `block` consecutive ones, and the runs are shuffled: rows that must
    be decoded together are then used together.
    """
    if block is None or block >= num_images:
        return permutation(seed, epoch, num_images)
    num_blocks = -(-num_images // block)
    shuffled = permutation(seed, epoch, num_images)
    rank = np.argsort(permutation(seed ^ 1, epoch, num_blocks), kind="stable")
    return shuffled[np.argsort(rank[shuffled // block], kind="stable")]
