"""Keys and the counter-based random numbers that depend on nothing but them.

Philox4x32-10 after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). All arithmetic is on
integers, so that a word is the same on every machine, in every batch and in every order.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

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
    "custom": 14,
    "sample": 15,
    "calibration": 16,
    "held_out": 17,
    "shuffled_pairs": 18,
    "synthesis": 19,
    "appended_canary": 20,
}
"""What the words are for. Append only: a number, once used, keeps its meaning."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.array([_M0, _M1], dtype=np.uint64)
_FEW = 12  # counters for which Python's integers are faster than numpy: 5 µs each against 55 µs a call
_BLOCK = 1 << 16  # images whose words are drawn at a time: the rounds of Philox take many times their memory


class ViewKey(NamedTuple):
    """Name one augmented image: view `view` of image `index`."""

    view: int
    index: int  # type: ignore[assignment]  # hides tuple.index


class Keys(Sequence[ViewKey]):
    """The keys of a batch as one array, int64 [B, 2]: nothing is made of them one by one."""

    def __init__(self, table: Ints) -> None:
        self.table = table

    @property
    def columns(self) -> tuple[Ints, Ints]:
        """The views and the indices, [B] each."""
        return self.table[:, 0], self.table[:, 1]

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> ViewKey: ...
    @overload
    def __getitem__(self, place: slice) -> "Keys": ...
    def __getitem__(self, place: int | slice) -> "ViewKey | Keys":
        """Return a key, or those of a slice."""
        found = self.table[place]
        return Keys(found) if isinstance(place, slice) else ViewKey(*found.tolist())

    def __iter__(self) -> Iterator[ViewKey]:
        return map(ViewKey, *(column.tolist() for column in self.columns))


def table_of(keys: Sequence[ViewKey]) -> Ints:
    """Return keys as an array, int64 [B, 2]."""
    return keys.table if isinstance(keys, Keys) else np.stack(columns_of(keys), axis=1)


def columns_of(keys: Sequence[ViewKey]) -> tuple[Ints, Ints]:
    """Return the views and the indices of keys, int64 [B] each."""
    if isinstance(keys, Keys):
        return keys.columns
    if not keys:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    views, indices = zip(*keys, strict=True)
    return np.fromiter(views, np.int64, len(keys)), np.fromiter(indices, np.int64, len(keys))


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Return four 32-bit words per counter; counters are uint64 arrays of 32-bit values, broadcast to one shape."""
    shape = np.broadcast_shapes(*(part.shape for part in counter))
    even, odd = np.empty((2, *shape), dtype=np.uint64), np.empty((2, *shape), dtype=np.uint64)
    even[0], odd[0], even[1], odd[1] = counter
    pair = (2, *(1,) * len(shape))
    multipliers = np.broadcast_to(_MULTIPLIERS.reshape(pair), even.shape).copy()
    products = np.empty_like(even)
    crossed = products[::-1]  # each half takes the other's product
    for round_key in _round_keys(key).reshape(10, *pair):
        np.multiply(even, multipliers, out=products)
        odd ^= round_key
        np.right_shift(crossed, _SHIFT, out=even)
        even ^= odd
        np.bitwise_and(crossed, _LOW, out=odd)
    return even[0], odd[0], even[1], odd[1]


@functools.lru_cache(maxsize=16)
def _round_keys(key: tuple[int, int]) -> Words:
    """Return the keys of the ten rounds, [10, 2]."""
    return np.array(
        [[(key[0] + number * _W0) & 0xFFFFFFFF, (key[1] + number * _W1) & 0xFFFFFFFF] for number in range(10)],
        dtype=np.uint64,
    )


def _philox_of_one(c0: int, c1: int, c2: int, c3: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the words of one counter, by Python's integers: faster than numpy for a few."""
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Draws(NamedTuple):
    """The random words of a batch of keys."""

    seed: int
    views: Words
    indices: Words

    @classmethod
    def of(cls, seed: int, keys: Sequence[ViewKey]) -> "Draws":
        """Take the words of `keys` under a 64-bit `seed`."""
        if isinstance(keys, Keys):
            return cls(seed, *(column.astype(np.uint64) for column in keys.columns))
        views, indices = zip(*keys, strict=True) if keys else ((), ())
        return cls(seed, np.fromiter(views, np.uint64), np.fromiter(indices, np.uint64))

    def words(self, stream: str, ordinal: int, count: int) -> Words:
        """Return `count` words per key, [B, count], each uniform in 0..2³²-1.

        `ordinal` distinguishes several operations that draw from one stream.
        """
        counter_low = STREAMS[stream] << 16 | ordinal << 8
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        num_blocks = -(-count // 4)
        if len(self.views) * num_blocks <= _FEW:
            few = [
                _philox_of_one(low, index & 0xFFFFFFFF, index >> 32, view, key)
                for view, index in zip(self.views.tolist(), self.indices.tolist(), strict=True)
                for low in range(counter_low, counter_low + num_blocks)
            ]
            return np.array(few, dtype=np.uint64).reshape(len(self.views), 4 * num_blocks)[:, :count]
        blocks = np.arange(counter_low, counter_low + num_blocks, dtype=np.uint64)
        indices = self.indices[:, None]
        words = philox((blocks, indices & _LOW, indices >> _SHIFT, self.views[:, None]), key)
        return np.stack(words, axis=2).reshape(len(self.views), -1)[:, :count]


def below(words: Words, limits: Ints | int) -> Ints:
    """Map words to integers in [0, limit): multiply and shift, bias below limit / 2³²."""
    return (words * np.asarray(limits, dtype=np.uint64) >> _SHIFT).astype(np.int64)


def bernoulli(words: Words, probability: float) -> NDArray[np.bool_]:
    """Return True with `probability`, exact to 2⁻³²."""
    return words < np.uint64(int(probability * 4294967296.0))


def uniform(words: Words) -> NDArray[np.float64]:
    """Map words to [0, 1), exactly representable in float64."""
    return words.astype(np.float64) / 4294967296.0


def order_words(seed: int, epoch: int, indices: Ints) -> Words:
    """Return the 64-bit words [n] by which an epoch orders these of its places."""
    words = np.empty(len(indices), dtype=np.uint64)
    for start in range(0, len(indices), _BLOCK):
        block = indices[start : start + _BLOCK].astype(np.uint64)
        pairs = Draws(seed, np.full_like(block, epoch), block).words("order", 0, 2)
        words[start : start + _BLOCK] = pairs[:, 0] << _SHIFT | pairs[:, 1]
    return words


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.integer[Any]]:
    """Return a keyed permutation of range(count): the ranks of 64-bit Philox words, in the narrowest type for them.

    A tie, one pair in 2⁶⁴, is broken by position, so that the order is a pure function of its arguments. Many words are
    sorted by their first byte, and then those of each: sorted at once they would take twice the memory.
    """
    if count <= _BLOCK:
        words = order_words(seed, epoch, np.arange(count))
        return np.argsort(words, kind="stable").astype(np.min_scalar_type(max(0, count - 1)))
    words = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _BLOCK):
        words[start : start + _BLOCK] = order_words(seed, epoch, np.arange(start, min(start + _BLOCK, count)))
    order = np.empty(count, np.min_scalar_type(max(0, count - 1)))
    stops = _by_first_byte(words, order)
    for start, stop in zip([0, *stops], stops, strict=False):
        part = order[start:stop]
        part[:] = part[np.argsort(words[part], kind="stable")]
    return order


def _by_first_byte(words: Words, order: NDArray[np.integer[Any]]) -> list[int]:
    """Fill in the places of words in order of the first byte, equal ones as they come; returns where each byte ends."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(words), _BLOCK):
        counts += np.bincount(_first_bytes(words[start : start + _BLOCK]), minlength=256)
    stops = np.cumsum(counts)
    free = stops - counts
    for start in range(0, len(words), _BLOCK):
        first = _first_bytes(words[start : start + _BLOCK])
        here = np.bincount(first, minlength=256)
        before = np.cumsum(here) - here
        order[np.repeat(free - before, here) + np.arange(len(first))] = start + np.argsort(first, kind="stable")
        free += here
    return [int(stop) for stop in stops]


def _first_bytes(words: Words) -> NDArray[np.uint8]:
    return (words >> np.uint64(56)).astype(np.uint8)
