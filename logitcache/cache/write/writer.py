"""Write whole shards behind the teacher: data first, the commit record last."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout, Rows
from logitcache.cache.format.layout import Layout
from logitcache.errors import RecipeError
from logitcache.store.base import Store
from logitcache.store.shards import Shard, seal

THREADS = 2
_ABSENT = 2**64 - 1


class ShardEncoder:
    """Turn rows into the stored bytes of a shard, as zarr-python writes them, without touching the disk."""

    def __init__(self, array: ArrayLayout) -> None:
        self._layout = replace(array, staged=None)  # as zarr names its shards
        self._bytes: dict[str, Buffer] = {}
        self._array = zarr.create_array(MemoryStore(store_dict=self._bytes), **array.zarr_options())

    def encode(self, shard: Shard, rows: NDArray[Any]) -> memoryview:
        """Return the bytes of the shard that holds `rows`, [stop - start, *row_shape]."""
        if self._layout.storage == "hot":
            return hot_shard(self._layout, rows)
        self._array[shard.view, self._layout.rows_of(shard)] = rows
        return memoryview(self._bytes.pop(self._layout.file(shard)).as_buffer_like())


class CacheWriter:
    """Write shards in the background: one may wait for the disk while another is hashed and a third is filled."""

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store = store
        self._groups = layout.groups
        self._encoders = {array.name: ShardEncoder(array) for array in layout.arrays}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="logitcache-writer")
        self._pending: deque[Future[None]] = deque()

    def submit(self, shard: Shard, rows: Rows, committed: Callable[[], None] = lambda: None) -> None:
        """Hand over a full shard, once the one before the last is committed; raise what went wrong with that one.

        Groups of which `rows` has nothing are left as they are. `committed` is called when the shard is.
        """
        while len(self._pending) >= THREADS:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(self._write, shard, rows, committed))

    def flush(self) -> None:
        """Wait until every shard handed over is committed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Finish the shards that are being written and end the threads."""
        self._threads.shutdown(wait=True)

    def _write(self, shard: Shard, rows: Rows, committed: Callable[[], None]) -> None:
        for group in self._groups:
            if group.arrays[0].name not in rows:
                continue
            records = [self._write_array(array, shard, rows[array.name]) for array in group.arrays]
            self._store.write(group.record_file(shard), b"".join(records))
        committed()

    def _write_array(self, array: ArrayLayout, shard: Shard, rows: NDArray[Any]) -> bytes:
        if not array.is_finite(rows):
            raise RecipeError(
                f"{array.name} {shard} would hold NaN or infinity: an "
                "answer is beyond the numbers of its encoding. Fix: dtype: float32, or another kind"
            )
        stored = self._encoders[array.name].encode(shard, rows)
        self._store.write(array.file(shard), stored)
        return commit_record(stored, array.file(shard))


def commit_record(stored: memoryview, key: str) -> bytes:
    """Return the record of a shard's stored bytes under a key: their size and their seal."""
    return stored.nbytes.to_bytes(8, "little") + seal(hashlib.sha256(stored).digest(), key)


def empty_rows(groups: Sequence[ArrayGroup], shard: Shard) -> Rows:
    """Allocate a shard's rows of every array; sums begin at zero."""
    arrays = [(array, array.rows_of(shard)) for group in groups for array in group.arrays]
    return {
        array.name: (np.zeros if array.per_shard else np.empty)((rows.stop - rows.start, *array.row_shape), array.dtype)
        for array, rows in arrays
    }


def hot_shard(array: ArrayLayout, rows: NDArray[Any]) -> memoryview:
    """Return the stored bytes of the shard that holds rows [n, *row_shape], as zarr-python writes it, by one copy.

    Rows in order, the last chunk filled up, then one entry per inner chunk (offset and size, both uint64, all ones for
    a chunk that is not there), then the crc32c of the entries, as the sharding codec of Zarr v3 has it with an index at
    the end.
    """
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
