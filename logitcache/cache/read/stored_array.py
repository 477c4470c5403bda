"""One array of an opened cache: its shards are read, compared with their commit records and decoded.

Packed shards are decoded as zarr's sharding codec does, without its cost for each of many small chunks, and in no more
memory than the rows that the layout implies, whatever the frames declare: zstd decompresses into an array of that size,
and refuses frames that hold more.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from logitcache.cache.format.arrays import INDEX_CHECKSUM_BYTES, INDEX_ENTRY_BYTES, ArrayLayout
from logitcache.cache.format.commits import Records
from logitcache.cache.format.derivation import fix_of_contents
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import parse_json
from logitcache.store.shards import NOT_FINITE, Longer, Shard, StoredShard

_THREADS = min(8, os.cpu_count() or 1)
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}
_MAGIC = b"\x28\xb5\x2f\xfd"


def require_known_codecs(layout: ArrayLayout, metadata: bytes) -> None:
    """Raise ValueError unless metadata name the codecs that `zarr_options` returns: zstd, on rows or on components."""
    chain = parse_json(metadata)["codecs"][0]["configuration"]["codecs"]
    names = [codec["name"] for codec in chain]
    orders = [list(codec["configuration"]["order"]) for codec in chain if codec["name"] == "transpose"]
    wanted = [list(codec["configuration"]["order"]) for codec in layout.zarr_options()["filters"] or ()]
    is_known = names == ["transpose"] * len(wanted) + ["bytes", "zstd"] and orders == wanted
    if not is_known or chain[-2] not in (_BYTES, _ONE_BYTE):
        raise ValueError("its metadata name other codecs than those of this format")


def decode(layout: ArrayLayout, stored: bytes, shard: Shard) -> NDArray[Any]:
    """Return a packed shard's rows [n, *row_shape]; raise ValueError or RuntimeError if the bytes are not a shard."""
    data = memoryview(stored)
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
    rows = rows[: wanted.stop - wanted.start]
    if not layout.is_finite(rows):
        raise ValueError(NOT_FINITE)
    return rows


def shortened(layout: ArrayLayout, shard: Shard, longer: bytes) -> bytes | None:
    """Return the bytes of the last shard of a view before images were appended, made of those after; None if not."""
    from logitcache.cache.write.writer import ShardEncoder  # which imports zarr: hardly any reader needs it

    try:
        if layout.storage == "hot":
            shape = (shard.stop - shard.start, *layout.row_shape)
            rows = np.frombuffer(longer, layout.dtype, math.prod(shape)).reshape(shape)
        else:
            rows = decode(layout, longer, shard)
    except (ValueError, RuntimeError):  # zstd has no class of its own
        return None
    return bytes(ShardEncoder(layout).encode(shard, rows))


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


@dataclass(frozen=True)
class StoredArray:
    """An array in a store and the commit records of its group; `fix` is the advice of errors about lost shards.

    `may_be_longer` returns whether images were appended to the cache since it was opened. An array can be pickled: each
    process opens the store and reads the metadata itself.
    """

    store: Store
    layout: ArrayLayout
    records: Records
    fix: str
    may_be_longer: Callable[[], bool] = bool

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredArray, (self.store, self.layout, self.records, self.fix, self.may_be_longer)

    @cached_property
    def metadata(self) -> bytes:
        """The metadata of the array."""
        key = f"{self.layout.name}/zarr.json"
        try:
            return self.store.read(key)
        except FileNotFoundError as error:
            raise CacheError(f"{self.store}/{key} is missing. {self.fix}") from error

    def stored(self, shard: Shard) -> StoredShard:
        """Return a shard with its record; raise CacheError if it is not committed."""
        number = self.layout.number_of(shard)
        found = self.records.of(number)
        if found is None:
            text = self.records.damaged.get(number, f"{self.store}/{self.layout.record_file(shard)} is missing")
            raise CacheError(f"{shard}: {text}. {self.fix}")
        stored = self.layout.stored(shard, found)
        is_last = shard.stop - shard.start < self.layout.shard_rows and not self.layout.per_shard
        if not is_last:
            return stored
        most = self.layout.stored_bounds(self.layout.shard_rows)[1]
        return stored._replace(longer=Longer(most, partial(self._shortened, shard)))

    def _shortened(self, shard: Shard, longer: bytes) -> bytes | None:
        return shortened(self.layout, shard, longer) if self.may_be_longer() else None

    def ensure(self, shards: Iterable[Shard]) -> None:
        """Download shards that are not here, several at a time."""
        if not self.store.is_local:
            self.store.ensure([self.stored(shard) for shard in shards])

    def open(self, shard: Shard) -> int:
        """Open the file of a shard, whose bytes match its record; raise CacheError if they do not."""
        self.ensure([shard])
        with self._explained(shard):
            return self.store.open(self.stored(shard))

    def rows(self, shard: Shard, *, keep: bool = True) -> NDArray[Any]:
        """Read and decode the rows of a shard, [n, *row_shape]; raise CacheError if it is missing or damaged.

        Without `keep` a downloaded shard is not kept here.
        """
        rows = self.layout.rows_of(shard)
        shape = (rows.stop - rows.start, *self.layout.row_shape)
        # Rows come first in a hot file, whose size has been compared.
        if self.layout.storage == "hot" and keep:
            with open(self.open(shard), "rb") as file:  # hashed only if it is not known to match
                return np.fromfile(file, self.layout.dtype, math.prod(shape)).reshape(shape)
        if keep:
            self.ensure([shard])
        with self._explained(shard):
            data = self.store.read_shard(self.stored(shard), keep=keep)
        if self.layout.storage == "hot":
            return np.frombuffer(bytearray(data), self.layout.dtype, math.prod(shape)).reshape(shape)
        try:
            require_known_codecs(self.layout, self.metadata)
            return decode(self.layout, data, shard)
        except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:  # zstd has no class of its own
            where = f"{self.store}/{self.layout.file(shard)}"
            raise CacheError(f"{where} cannot be decoded: {error}. {fix_of_contents(self.fix)}") from error

    @contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CacheError(f"{self.store}/{self.layout.file(shard)} is missing. {self.fix}") from error
        except CacheError as error:
            raise CacheError(f"{self.store} is damaged: {error}.\n  {self.fix}") from error
