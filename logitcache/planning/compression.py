"""Extrapolate the compressed bytes of all rows, and the seconds of compressing them, from a few rows."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayLayout, Rows
from logitcache.cache.format.layout import Layout
from logitcache.cache.write.writer import ShardEncoder
from logitcache.store.shards import Shard

REPEATS = 5
"""How often a shard is encoded to time it, within a second."""


class Piece(NamedTuple):
    """Rows of a shard that were answered, and their places in it."""

    rows: Rows
    places: list[int]


class Stored(NamedTuple):
    """Compressed bytes of a row by array; seconds of the thread that writes, by row-view and by shard.

    cores: seconds by row-view of all cores.
    """

    packed: dict[str, float]
    row: float
    shard: float
    cores: float


def stored_of(layout: Layout, pieces: Mapping[Shard, Piece]) -> Stored:
    """Encode answered rows as the writer does, in memory."""
    packed: dict[str, float] = {}
    row = fixed = cores = 0.0
    for array in layout.arrays:
        samples = [_sample(array, shard, piece) for shard, piece in pieces.items() if array.name in piece.rows]
        if not samples:  # it lacks no shard
            continue
        if array.storage == "packed":
            total = sum(payload(array, values, whole) * len(values) for values, whole in samples)
            packed[array.name] = total / sum(len(values) for values, _ in samples)
        values = samples[0][0]
        one, further = encoded(array, values[:1], REPEATS), len(values) - 1
        fixed += one.clock
        if further:
            many = encoded(array, values, REPEATS)
            row += max(0.0, many.clock - one.clock) / further
            cores += max(0.0, many.cores - one.cores) / further
    return Stored(packed, row, fixed, cores)


def _sample(array: ArrayLayout, shard: Shard, piece: Piece) -> tuple[NDArray[Any], int]:
    """Return the answered rows of a shard in their order, and how many rows it has; sums are scaled to all its rows."""
    rows = piece.rows[array.name]
    if array.per_shard:
        return rows * ((shard.stop - shard.start) / len(piece.places)), 1
    return rows[np.sort(piece.places)], len(rows)


def payload(array: ArrayLayout, values: NDArray[Any], whole: int) -> float:
    """Return the compressed bytes of a row in a shard of `whole` rows, from some of them, [n, *row_shape].

    Exact for a whole shard, and for whole inner chunks if these are alike. Of less than a chunk, what the second half
    of the rows adds to the first is what each further row adds.
    """
    count, chunk = len(values), min(array.inner_rows, whole)
    if count >= whole or count < 2:
        return encoded(array, values).payload / count
    if count >= chunk:
        count = count // chunk * chunk
        return encoded(array, values[:count]).payload / count
    # Of a shard that is one chunk of so many rows.
    sizes = [encoded(replace(array, shard_rows=rows), values[:rows]).payload for rows in (count // 2, count)]
    further = (sizes[1] - sizes[0]) / (count - count // 2)
    return (sizes[1] + further * (chunk - count)) / chunk


class EncodeCost(NamedTuple):
    """The bytes of a shard without its index, and the seconds it took: by the clock, and of all cores."""

    payload: int
    clock: float
    cores: float


def encoded(array: ArrayLayout, values: NDArray[Any], repeats: int = 1) -> EncodeCost:
    """Encode and hash rows as the writer does; the fastest of several times counts, as nothing delayed it."""
    encoder, part = ShardEncoder(array), Shard(0, 0, len(values) * array.images_per_row)
    clocks, cores, size = list[float](), list[float](), 0
    while len(clocks) < min(2, repeats) or (len(clocks) < repeats and sum(clocks) < 1.0):
        clock, busy = time.perf_counter(), time.process_time()
        stored = encoder.encode(part, values)
        hashlib.sha256(stored).digest()
        clocks.append(time.perf_counter() - clock)
        cores.append(time.process_time() - busy)
        size = stored.nbytes
    return EncodeCost(size - array.hot_bytes(0), min(clocks), min(cores))
