"""What a few rows tell of writing all: the bytes that compression leaves, and the seconds that it takes."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.layout import Layout
from logitcache.cache.write.writer import Rows, ShardEncoder
from logitcache.store.shards import Shard

REPEATS = 5
"""How often a shard is encoded to time it, within a second."""


class Piece(NamedTuple):
    """Rows of a shard that were answered, and their places in it."""

    rows: Rows
    places: list[int]


class Stored(NamedTuple):
    """Bytes of a row after compression, by array; seconds that writing takes a thread by row-view and by shard.

    cores: seconds by row-view of all cores.
    """

    packed: dict[str, float]
    row: float
    shard: float
    cores: float


def stored_of(layout: Layout, pieces: Mapping[Shard, Piece]) -> Stored:
    """Encode what was answered as the writer does, in memory."""
    packed: dict[str, float] = {}
    row = fixed = cores = 0.0
    for array in layout.arrays:
        samples = [_sample(array, shard, piece) for shard, piece in pieces.items() if array.name in piece.rows]
        if not samples:  # nothing of it is to do
            continue
        if array.storage == "packed":
            total = sum(payload(array, sample) * len(sample.values) for sample in samples)
            packed[array.name] = total / sum(len(sample.values) for sample in samples)
        one, further = encoded(array, _first(samples[0], 1), REPEATS), len(samples[0].values) - 1
        fixed += one.clock
        if further:
            many = encoded(array, samples[0], REPEATS)
            row += max(0.0, many.clock - one.clock) / further
            cores += max(0.0, many.cores - one.cores) / further
    return Stored(packed, row, fixed, cores)


class Sample(NamedTuple):
    """Rows of a shard, [n, *row_shape] in their order, beside the number of rows that it has."""

    shard: Shard
    values: NDArray[Any]
    whole: int


def _sample(array: ArrayLayout, shard: Shard, piece: Piece) -> Sample:
    """Take what was filled of a shard; sums over its rows become those of a whole shard."""
    rows = piece.rows[array.name]
    if array.per_shard:
        return Sample(shard, rows * ((shard.stop - shard.start) / len(piece.places)), 1)
    return Sample(shard, rows[np.sort(piece.places)], len(rows))


def _first(sample: Sample, count: int) -> Sample:
    return sample._replace(values=sample.values[:count])


def payload(array: ArrayLayout, sample: Sample) -> float:
    """Return the bytes of a row after compression, in a shard of which there is a sample.

    Exact of a whole shard, and of whole inner chunks as far as these are alike. Of less than a chunk, what the second
    half of the sample adds to the first is what each further row adds.
    """
    count, chunk = len(sample.values), min(array.inner_rows, sample.whole)
    if count >= sample.whole or count < 2:
        return encoded(array, sample).payload / count
    if count >= chunk:
        count = count // chunk * chunk
        return encoded(array, _first(sample, count)).payload / count
    sizes = [encoded(_cut(array, rows), _first(sample, rows)).payload for rows in (count // 2, count)]
    further = (sizes[1] - sizes[0]) / (count - count // 2)
    return (sizes[1] + further * (chunk - count)) / chunk


def _cut(array: ArrayLayout, rows: int) -> ArrayLayout:
    """Return the layout of an array whose shards are one chunk of so many rows."""
    return replace(array, shard_rows=rows)


class Encoded(NamedTuple):
    """The bytes of a shard without its index, and the seconds it took: by the clock, and of all cores."""

    payload: int
    clock: float
    cores: float


def encoded(array: ArrayLayout, sample: Sample, repeats: int = 1) -> Encoded:
    """Encode and hash rows as the writer does; of several times the fastest counts, as nothing else held it up."""
    encoder, part = ShardEncoder(array), Shard(0, 0, len(sample.values) * array.images_per_row)
    clocks, cores, size = list[float](), list[float](), 0
    while len(clocks) < min(2, repeats) or (len(clocks) < repeats and sum(clocks) < 1.0):
        clock, busy = time.perf_counter(), time.process_time()
        stored = encoder.encode(part, sample.values)
        hashlib.sha256(stored).digest()
        clocks.append(time.perf_counter() - clock)
        cores.append(time.process_time() - busy)
        size = stored.nbytes
    return Encoded(size - array.hot_bytes(0), min(clocks), min(cores))
