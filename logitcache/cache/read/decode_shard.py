"""Decode packed shards: what zarr's sharding codec does, without its cost for each of many small chunks.

Decoding takes no more memory than the rows that the layout implies, whatever the frames declare: zstd decompresses into
an array of that size, and refuses frames that hold more.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from logitcache.cache.format.derivation import fix_of_contents
from logitcache.cache.read.stored_array import StoredArray
from logitcache.errors import CacheError
from logitcache.store.arrays import INDEX_CHECKSUM_BYTES, INDEX_ENTRY_BYTES, NOT_FINITE, Shard
from logitcache.store.safe_files import parse_json

_THREADS = min(8, os.cpu_count() or 1)
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}
_MAGIC = b"\x28\xb5\x2f\xfd"


class Unpacker:
    """Decode shards of one packed array. It can be pickled: each process reads the metadata itself."""

    def __init__(self, stored: StoredArray) -> None:
        self._stored, self._layout = stored, stored.layout

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpacker, (self._stored,)

    def __call__(self, shard: Shard, *, keep: bool = True) -> NDArray[Any]:
        """Return a shard's rows [n, *row_shape]; raise CacheError where it is missing or damaged."""
        data = self._stored.read(shard, keep=keep)
        try:
            return self._decode(data, shard)
        except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:  # zstd has no class of its own
            where = f"{self._stored.store}/{self._layout.file(shard)}"
            raise CacheError(f"{where} cannot be decoded: {error}. {fix_of_contents(self._stored.fix)}") from error

    def _decode(self, data: bytes, shard: Shard) -> NDArray[Any]:
        if not self._has_known_codecs:
            raise ValueError("its metadata name other codecs than those of this format")
        rows = self._inflate(data, shard)
        if not self._layout.is_finite(rows):
            raise ValueError(NOT_FINITE)
        return rows

    @cached_property
    def metadata(self) -> bytes:
        """The metadata of the array."""
        key = f"{self._layout.name}/zarr.json"
        try:
            return self._stored.store.read(key)
        except FileNotFoundError as error:
            raise CacheError(f"{self._stored.store}/{key} is missing. {self._stored.fix}") from error

    @cached_property
    def _has_known_codecs(self) -> bool:
        """Whether the metadata name the codecs that `zarr_options` asks for: zstd, on rows or on components."""
        chain = parse_json(self.metadata)["codecs"][0]["configuration"]["codecs"]
        names = [codec["name"] for codec in chain]
        orders = [list(codec["configuration"]["order"]) for codec in chain if codec["name"] == "transpose"]
        wanted = [list(codec["configuration"]["order"]) for codec in self._layout.zarr_options()["filters"] or ()]
        is_known = names == ["transpose"] * len(wanted) + ["bytes", "zstd"] and orders == wanted
        return is_known and chain[-2] in (_BYTES, _ONE_BYTE)

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
        if layout.order == "component":
            components = rows.reshape(used, *layout.row_shape, layout.inner_rows)
            rows = np.moveaxis(components, -1, 1).reshape(rows.shape)
        return rows[: wanted.stop - wanted.start]


def read_rows(stored: StoredArray, shard: Shard, *, keep: bool = True) -> NDArray[Any]:
    """Return a shard's rows [n, *row_shape] of a hot or packed array; raise CacheError if it is missing or damaged.

    Without `keep` a shard that is elsewhere is not kept here.
    """
    if stored.layout.storage == "packed":
        return Unpacker(stored)(shard, keep=keep)
    rows = stored.layout.rows_of(shard)
    shape = (rows.stop - rows.start, *stored.layout.row_shape)
    # Rows come first in the file of a hot shard, whose size has been compared.
    if not keep:
        data = stored.read(shard, keep=False)
        return np.frombuffer(data, stored.layout.dtype, math.prod(shape)).reshape(shape).copy()
    with open(stored.open(shard), "rb") as file:
        return np.fromfile(file, stored.layout.dtype, math.prod(shape)).reshape(shape)


def _content_bytes(frame: memoryview) -> int | None:
    """Return the decompressed size that a zstd frame declares (RFC 8878, 3.1.1.1); None if there is none."""
    if len(frame) < 5 or frame[:4] != _MAGIC:
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
