"""Decode packed shards: what zarr's sharding codec does, without its cost for each of many small chunks."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import zarr
from numcodecs import zstd
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from logitcache.cache.arrays import INDEX_CHECKSUM_BYTES, INDEX_ENTRY_BYTES, Shard
from logitcache.cache.stored_array import StoredArray
from logitcache.errors import CacheError
from logitcache.safe_files import parse_json

_THREADS = min(8, os.cpu_count() or 1)
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}


class Unpacker:
    """Decode shards of one packed array. It can be pickled: each process reads the metadata itself."""

    def __init__(self, stored: StoredArray) -> None:
        self._stored, self._layout = stored, stored.layout

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpacker, (self._stored,)

    def __call__(self, shard: Shard) -> NDArray[Any]:
        """Return a shard's rows [n, *row_shape]; raise CacheError where it is missing or damaged."""
        data = self._stored.read(shard)
        try:
            return self._decode(data, shard)
        except Exception as error:  # zarr and its codecs raise anything for damaged bytes
            where = f"{self._stored.store}/{self._layout.file(shard)}"
            raise CacheError(f"{where} cannot be decoded: {error}. {self._stored.fix}") from error

    @cached_property
    def metadata(self) -> bytes:
        """The metadata of the array."""
        key = f"{self._layout.name}/zarr.json"
        try:
            return self._stored.store.read(key)
        except FileNotFoundError as error:
            raise CacheError(f"{self._stored.store}/{key} is missing. {self._stored.fix}") from error

    @cached_property
    def _decode(self) -> Callable[[bytes, Shard], NDArray[Any]]:
        """Decode plain rows under zstd here, and leave every other chain of codecs to zarr."""
        chain = parse_json(self.metadata)["codecs"][0]["configuration"]["codecs"]
        plain = len(chain) == 2 and chain[0] in (_BYTES, _ONE_BYTE) and chain[1]["name"] == "zstd"
        return self._inflate if plain else self._read

    def _read(self, data: bytes, shard: Shard) -> NDArray[Any]:
        # In memory: what is decoded are the bytes that were compared, whatever happens to the file.
        key = self._layout.file(shard).removeprefix(f"{self._layout.name}/")
        held: dict[str, Buffer] = {"zarr.json": cpu.Buffer.from_bytes(self.metadata), key: cpu.Buffer.from_bytes(data)}
        array = zarr.open_array(MemoryStore(store_dict=held, read_only=True), mode="r")
        return np.asarray(array[shard.view, self._layout.rows_of(shard)])

    def _inflate(self, stored: bytes, shard: Shard) -> NDArray[Any]:
        layout, data = self._layout, memoryview(stored)
        num_chunks, chunk_bytes = layout.shard_rows // layout.inner_rows, layout.inner_rows * layout.row_bytes
        wanted = layout.rows_of(shard)
        used = -(-(wanted.stop - wanted.start) // layout.inner_rows)
        index_bytes = num_chunks * INDEX_ENTRY_BYTES
        index_start = len(data) - index_bytes - INDEX_CHECKSUM_BYTES
        if index_start < 0:
            raise ValueError(f"{len(data)} bytes do not hold the index of its chunks")
        index = np.frombuffer(data, "<u8", 2 * num_chunks, index_start).reshape(-1, 2)[:used]
        if (index[:, 1] > index_start).any() or (index[:, 0] > index_start - index[:, 1]).any():
            raise ValueError("its index points outside it")
        rows = np.empty((used * layout.inner_rows, *layout.row_shape), layout.dtype)
        flat = rows.reshape(-1).view(np.uint8)

        def inflate(numbers: range) -> None:
            for number in numbers:
                start, size = index[number].tolist()
                chunk = data[start : start + size]
                if _content_bytes(chunk) != chunk_bytes:
                    raise ValueError(f"chunk {number} does not hold {chunk_bytes} bytes")
                zstd.decompress(chunk, flat[number * chunk_bytes : (number + 1) * chunk_bytes])

        # Decompression leaves other threads the interpreter.
        list(_pool(os.getpid()).map(inflate, [range(part, used, _THREADS) for part in range(min(used, _THREADS))]))
        return rows[: wanted.stop - wanted.start]


def _content_bytes(frame: memoryview) -> int | None:
    """Return the decompressed size that a zstd frame declares (RFC 8878, 3.1.1.1); None where it does not."""
    if len(frame) < 5:
        return None
    descriptor = frame[4]
    is_single = descriptor >> 5 & 1
    start = 6 - is_single + (0, 1, 2, 4)[descriptor & 3]
    size = (is_single, 2, 4, 8)[descriptor >> 6]
    declared = int.from_bytes(frame[start : start + size], "little") + (256 if size == 2 else 0)
    return declared if size else None


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process: a fork has none of its parent's."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="logitcache-unpack")
