"""Images that were appended to a cache: what its manifest records of them, and the canaries among them."""

import numpy as np

from logitcache.config.recipe import Component, Count
from logitcache.views.datasets.base import Fingerprint
from logitcache.views.keys import Draws, ViewKey, below

MOST_CANARIES = 512
"""Canaries among appended images: of each number e times as large about 8 more."""

_CERTAIN = 8
_BLOCK = 1 << 16


MAX_ID_BYTES = 4096
"""Bytes of the id of an image, on average over all of a cache: as many as a path may have."""


class Appended(Component):
    """The images that a cache began with, `first`, and the bytes of the ids of all.

    It is the same however many runs appended the images.
    """

    first: Fingerprint
    id_bytes: Count

    def require_bounded(self, num_images: int) -> None:
        """Raise ValueError for ids that are longer than those of so many images can be."""
        if self.id_bytes > MAX_ID_BYTES * num_images:
            raise ValueError(f"ids of {self.id_bytes} bytes for {num_images} images, {MAX_ID_BYTES} each at most")


def appended_canaries(seed: int, num_first: int, num_images: int, num_views: int) -> list[ViewKey]:
    """Choose keys among the images from `num_first` on, ascending by image.

    Whether an image is chosen depends on its index alone: more images only add to the keys.
    """
    keys: list[ViewKey] = []
    for start in range(num_first, num_images, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, num_images), dtype=np.uint64)
        words = Draws(seed, np.zeros_like(indices), indices).words("appended_canary", 0, 2)
        # With a probability of 8 / place, by whole numbers: words are below 2^32.
        chosen = words[:, 0] * (indices - np.uint64(num_first) + np.uint64(1)) < np.uint64(_CERTAIN << 32)
        views = below(words[:, 1], num_views)
        keys += map(ViewKey, views[chosen].tolist(), indices[chosen].tolist())
    return keys
