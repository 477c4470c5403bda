"""One array of an opened cache: its shards are read, compared with their commit records and decoded."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.commits import Records
from logitcache.cache.format.derivation import fix_of_contents
from logitcache.cache.read.decode_shard import decode, require_known_codecs
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.shards import Shard, StoredShard


@dataclass(frozen=True)
class StoredArray:
    """An array in a store, the records of its group, and `fix`, which tells how lost shards are written again.

    It can be pickled: each process opens the store and reads the metadata itself.
    """

    store: Store
    layout: ArrayLayout
    records: Records
    fix: str

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredArray, (self.store, self.layout, self.records, self.fix)

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
        return self.layout.stored(shard, found)

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
