"""Partners: who is mixed with whom, an involution that any process can look up for any image.

In each view a keyed permutation E lays the images out in places, and the images in places 2t and 2t + 1 are partners.
E is a generalised Feistel network over a grid that just holds the images, walked along its cycle until it lands inside
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): E and its inverse take no memory, and hardly
ever a second step.
"""

from typing import NamedTuple

import numpy as np

from logitcache.views.keys import Draws, Ints, Words

NUM_ROUNDS = 6
MIN_SIDE = 3  # of the grid: smaller ones would favour some pairs


class Partners(NamedTuple):
    """Partners within windows of `window` consecutive images; of a window of odd size one image stays alone.

    Images that were appended to the `num_first` ones of a cache fill windows of their own.
    """

    seed: int
    num_images: int
    window: int
    num_first: int

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
        begin = np.where(indices < self.num_first, 0, self.num_first)
        stop = np.where(indices < self.num_first, self.num_first, self.num_images)
        starts = indices - (indices - begin) % self.window
        return starts, np.minimum(self.window, stop - starts)

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
