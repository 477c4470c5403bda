"""Whole shards, one at a time: what goes through all rows of a cache in order reads them so, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import Rows
from logitcache.cache.format.layout import Layout
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.verify import require_intact
from logitcache.store.shards import Shard
from logitcache.targets import Targets


@dataclass(frozen=True)
class ShardReader:
    """Read whole shards of an opened cache; `views`: what is recorded of the views themselves as well.

    It can be pickled: each process reads tables and metadata itself.
    """

    snapshot: Snapshot
    views: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.snapshot, self.views)

    @cached_property
    def layout(self) -> Layout:
        """The arrays that are read."""
        return self.snapshot.layout if self.views else replace(self.snapshot.layout, views=None)

    @cached_property
    def codecs(self) -> TargetCodecs:
        """What decodes them."""
        return TargetCodecs(self.snapshot.store, self.snapshot.manifest, self.layout)

    def rows(self, shard: Shard) -> dict[str, NDArray[Any]]:
        """Return a shard's rows by array name, [rows, ...]; raise CacheError if they are not those committed."""
        require_intact(self.snapshot, self.layout.groups, [shard])
        return {
            array.name: self.snapshot.array(array).rows(shard) for group in self.layout.groups for array in group.rows
        }

    def batches(self, shard: Shard, size: int) -> Iterator[tuple[int, dict[str, Targets]]]:
        """Yield the answers of all teachers to up to `size` rows at a time, with the index of the first image."""
        rows = self.rows(shard)
        for start in range(0, shard.stop - shard.start, size):
            yield shard.start + start, self.targets(shard, rows, slice(start, start + size))

    def targets(self, shard: Shard, rows: Rows, some: slice | NDArray[np.int64]) -> dict[str, Targets]:
        """Decode some of a shard's rows, by teacher; raise CacheError for one that its encoding declares wrong."""
        arrays = (array.name for group in self.layout.targets for array in group.rows)
        return self.codecs.targets({name: rows[name][some] for name in arrays}, lambda row: shard)
