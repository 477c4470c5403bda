"""Keys and the counter-based random numbers that depend on nothing but them.

Philox4x32-10 after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). All arithmetic is on
integers, so that a word is the same on every machine, in every batch and in every order.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

STREAMS = {
    "crop": 0,
    "flip": 1,
    "jitter": 2,
    "randaugment": 3,
    "erase": 4,
    "mix": 5,
    "pair": 6,
    "order": 7,
    "canary": 8,
    "resized_crop": 9,
    "grayscale": 10,
    "blur": 11,
    "trivial_augment": 12,
    "transform": 13,
}
"""What the words are for. Append only: a number, once used, keeps its meaning."""

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_BLOCK = 1 << 16  # images whose words are drawn at a time: the rounds of Philox take many times their memory


class ViewKey(NamedTuple):
    """Name one augmented image: view `view` of image `index`."""

    view: int
    index: int  # type: ignore[assignment]  # hides tuple.index


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return four 32-bit words per counter; counters are uint64 arrays [B] holding 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Draws(NamedTuple):
    """The random words of a batch of keys."""

    seed: int
    views: Words
    indices: Words

    @classmethod
    def of(cls, seed: int, keys: "list[ViewKey]") -> "Draws":
        """Take the words of `keys` under a 64-bit `seed`."""
        pairs = np.array(keys, dtype=np.uint64).reshape(-1, 2)
        return cls(seed, pairs[:, 0], pairs[:, 1])

    def words(self, stream: str, ordinal: int, count: int) -> Words:
        """Return `count` words per key, [B, count], each uniform in 0..2³²-1.

        `ordinal` tells apart several operations that draw from one stream.
        """
        counter_low = np.full_like(self.views, STREAMS[stream] << 16 | ordinal << 8)
        low, high = self.indices & _LOW, self.indices >> _SHIFT
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        blocks = [
            philox((counter_low | np.uint64(block), low, high, self.views), key) for block in range(-(-count // 4))
        ]
        return np.stack([word for block in blocks for word in block], axis=1)[:, :count]


def below(words: Words, limits: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Map words to integers in [0, limit): multiply and shift, bias below limit / 2³²."""
    return (words * np.asarray(limits, dtype=np.uint64) >> _SHIFT).astype(np.int64)


def bernoulli(words: Words, probability: float) -> NDArray[np.bool_]:
    """Return True with `probability`, exact to 2⁻³²."""
    return words < np.uint64(int(probability * 4294967296.0))


def uniform(words: Words) -> NDArray[np.float64]:
    """Map words to [0, 1), exactly representable in float64."""
    return words.astype(np.float64) / 4294967296.0


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return a keyed permutation of range(count): the ranks of 64-bit Philox words.

    A tie, one pair in 2⁶⁴, is broken by position, so that the order is a pure function of its arguments.
    """
    words = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, count), dtype=np.uint64)
        pairs = Draws(seed, np.full_like(indices, epoch), indices).words("order", 0, 2)
        words[start : start + _BLOCK] = pairs[:, 0] << _SHIFT | pairs[:, 1]
    return np.argsort(words, kind="stable")
