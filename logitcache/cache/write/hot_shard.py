"""Shard files of hot arrays: the bytes that zarr-python writes, at the speed of a copy.

Rows in order, then one entry per inner chunk (offset and size, both uint64, all ones for a chunk that is not there),
then the crc32c of the entries, as the sharding codec of Zarr v3 has it with an index at the end.
"""

from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from logitcache.store.arrays import ArrayLayout

_ABSENT = 2**64 - 1


def hot_shard(array: ArrayLayout, rows: NDArray[Any]) -> memoryview:
    """Return the stored bytes of the shard that holds rows [n, *row_shape]; its last chunk is filled up."""
    stored = np.empty(array.hot_bytes(len(rows)), np.uint8)
    num_chunks = -(-len(rows) // array.inner_rows)
    index = _index(array.shard_rows // array.inner_rows, num_chunks, array.inner_rows * array.row_bytes)
    values = stored[: len(stored) - len(index)].view(array.dtype).reshape(-1, *array.row_shape)
    values[: len(rows)] = rows
    values[len(rows) :] = array.zarr_options()["fill_value"]
    stored[len(stored) - len(index) :] = np.frombuffer(index, np.uint8)
    return stored.data


@lru_cache(maxsize=64)
def _index(num_chunks: int, num_present: int, chunk_bytes: int) -> bytes:
    entries = np.full((num_chunks, 2), _ABSENT, "<u8")
    entries[:num_present, 0] = np.arange(num_present) * chunk_bytes
    entries[:num_present, 1] = chunk_bytes
    return entries.tobytes() + int(google_crc32c.value(entries.tobytes())).to_bytes(4, "little")
