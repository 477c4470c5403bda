"""One array of an opened cache, and the commit records that its shards must match."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from logitcache.cache.format.commits import Records
from logitcache.errors import CacheError
from logitcache.store.arrays import ArrayLayout, Shard, StoredShard
from logitcache.store.base import Store


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies, the records of its group, and `fix`, what writes lost shards again. It can be pickled."""

    store: Store
    layout: ArrayLayout
    records: Records
    fix: str

    def part(self, shard: Shard) -> StoredShard:
        """Return a shard with its record; raise CacheError if it is not committed."""
        number = self.layout.number_of(shard)
        found = self.records.of(number)
        if found is None:
            where = f"view {shard.view} rows {shard.start}..{shard.stop}"
            text = self.records.damaged.get(number, f"{self.store}/{self.layout.record_file(shard)} is missing")
            raise CacheError(f"{where}: {text}. {self.fix}")
        return StoredShard(self.layout, shard, self.layout.record_in(found))

    def ensure(self, shards: Iterable[Shard]) -> None:
        """Download shards that are not here, several at a time."""
        if not self.store.is_local:
            self.store.ensure([self.part(shard) for shard in shards])

    def open(self, shard: Shard) -> int:
        """Open the file of a shard, whose bytes match its record; raise CacheError if they do not."""
        self.ensure([shard])
        with self._explained(shard):
            return self.store.open(self.part(shard))

    def read(self, shard: Shard, *, keep: bool = True) -> bytes:
        """Read a shard, whose bytes match its record; raise CacheError if they do not. `keep` as for the store."""
        if keep:
            self.ensure([shard])
        with self._explained(shard):
            return self.store.read_shard(self.part(shard), keep=keep)

    @contextlib.contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CacheError(f"{self.store}/{self.layout.file(shard)} is missing. {self.fix}") from error
        except CacheError as error:
            raise CacheError(f"{self.store} is damaged: {error}.\n  {self.fix}") from error
