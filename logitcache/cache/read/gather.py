"""Gather rows by key: from committed shards, once their bytes are compared with their records."""

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout
from logitcache.cache.read.mapped import MappedRows
from logitcache.cache.read.row_sources import PackedRows, RowSource, num_kept
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.verify import require_intact, row_shards
from logitcache.errors import CacheError
from logitcache.store.mirrors_folder import SIZE
from logitcache.store.shards import Shard
from logitcache.store.shared_memory import shared_shards
from logitcache.views.keys import ViewKey, columns_of


class StoredRows:
    """Rows of all arrays by place. The shards of a view are compared with their records before its first row is read.

    Of a remote cache that downloads the view, and prefetches the next one. As many of its views stay mapped as half of
    the mirrors' folder holds: files that other runs evict take up the disk until they are unmapped.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot, self._layout, self._store = snapshot, snapshot.layout, snapshot.store
        self._is_complete = snapshot.complete
        self._shape = self._layout.num_views, self._layout.num_images
        self._padded_shape = self._layout.num_views, self._layout.shards_per_view * self._layout.shard_rows
        self._compared: set[int] = set()
        self._prepared: dict[int, None] = {}  # in order
        self._is_prepared = False
        # Rows are not gathered from a view that is being unmapped.
        self._using: AbstractContextManager[object] = nullcontext() if self._store.is_local else threading.RLock()

    def rows(self, keys: Sequence[ViewKey]) -> dict[str, NDArray[Any]]:
        """Gather the rows of keys from the arrays of all targets by array name, [B, *row_shape] each."""
        with self._using:
            return self.take(self.places(keys))

    def take(self, places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Gather the rows at places, [B]: `places` has prepared their views."""
        for source in self._sources.values():
            source.expect(places)
        rows = {}  # a comprehension takes a frame, which a batch of short rows feels
        for name, source in self._sources.items():
            rows[name] = source.take(places)
        return rows

    def places(self, keys: Sequence[ViewKey]) -> NDArray[np.int64]:
        """Return the places of the rows of keys in every array, [B]; raise for a key that the cache does not have."""
        views, indices = columns_of(keys)
        shape = self._shape
        try:
            places = np.ravel_multi_index((views, indices), self._padded_shape)  # the quickest check that numpy has
            if len(indices) and indices.max() >= shape[1]:
                raise ValueError  # between the last image and the end of its shard
        except ValueError:
            low, high = (views.min(), indices.min()), (views.max(), indices.max())
            raise IndexError(
                f"keys run from {tuple(map(int, low))} to {tuple(map(int, high))}; the cache has {shape[0]} views "
                f"of {shape[1]} images"
            ) from None
        if not self._is_complete:
            self._require_committed(views, indices)
        if not self._is_prepared:
            with self._using:
                self._prepare(set(views.tolist()))
        return places

    def compare(self, views: set[int] | None = None) -> None:
        """Raise CacheError naming the damaged shards of some views, or of all, that were not compared before."""
        new = (self._shards.keys() if views is None else views) - self._compared
        require_intact(self._snapshot, self._downloaded, self._of_views(sorted(new)))
        self._compared |= new

    def _prepare(self, wanted: set[int]) -> None:
        views = wanted - self._prepared.keys()
        if not views:
            return
        for view in () if self._store.is_local else [view for view in self._prepared if view not in wanted]:
            # Those that were prepared first are unmapped until there is room.
            if len(self._prepared) + len(views) <= self._num_mapped:
                break
            for source in self._sources.values():
                source.forget(view)
            del self._prepared[view]
            self._compared.discard(view)
        self.compare(views)
        for source in self._sources.values():
            for view in views:
                source.prepare(view)
        self._prepared |= dict.fromkeys(sorted(views))
        self._is_prepared = self._store.is_local and len(self._prepared) == self._layout.num_views
        if not self._store.is_local:
            first, count = max(wanted) + 1, self._layout.num_views
            following = dict.fromkeys(view % count for view in range(first, first + len(wanted)))
            shards = self._of_views(following.keys() - self._prepared.keys())
            self._store.ensure((), ahead=row_shards(self._snapshot, self._downloaded, shards))

    @cached_property
    def _num_mapped(self) -> int:
        """Views of a remote cache that are mapped at a time."""
        return max(1, (self._store.limit or 0) // (2 * max(1, self._bytes(self._downloaded))))

    @cached_property
    def _downloaded(self) -> Sequence[ArrayGroup]:
        """What is downloaded of a view before it is read: all, or only hot arrays if two views exceed the limit.

        Packed shards are then downloaded as they are read. Raises CacheError if there is no room for hot ones either.
        """
        limit, num_views = self._store.limit, min(2, self._layout.num_views)
        if limit is None or num_views * self._bytes(self._layout.groups) <= limit:
            return self._layout.groups
        hot = [group for group in self._layout.targets if any(row.storage == "hot" for row in group.rows)]
        needed = num_views * self._bytes(hot)
        if needed > limit:
            raise CacheError(
                f"a view of {self._store} takes {needed // num_views} bytes, the next is brought while one is read, "
                f"and copies may hold {limit}. Fix: {SIZE}={needed} or more, or losses that ask for fewer targets"
            )
        return hot

    def _bytes(self, groups: Sequence[ArrayGroup]) -> int:
        """Return the stored bytes of the first view, of which other views take about as many."""
        shards = next(iter(self._shards.values()), [])
        return sum(shard.size for shard in row_shards(self._snapshot, groups, shards))

    def _of_views(self, views: Iterable[int]) -> list[Shard]:
        return [shard for view in views for shard in self._shards.get(view, ())]

    @cached_property
    def _shards(self) -> dict[int, list[Shard]]:
        """The committed shards of each view."""
        shards: dict[int, list[Shard]] = {}
        for shard in self._snapshot.shards:
            shards.setdefault(shard.view, []).append(shard)
        return shards

    def _require_committed(self, views: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Raise CacheError for a key of a shard that is not committed: its addresses cannot be read."""
        for view, index in zip(views.tolist(), indices.tolist(), strict=True):
            if self._layout.shard(view, index // self._layout.shard_rows) not in self._shards.get(view, ()):
                raise CacheError(
                    f"{self._store}: view {view} of image {index} is not committed yet. {self._snapshot.fix}"
                )

    @cached_property
    def _sources(self) -> dict[str, RowSource]:
        shared = shared_shards()

        def source(array: ArrayLayout) -> RowSource:
            if array.storage == "hot":
                return MappedRows(self._snapshot.array(array), self._snapshot.shards)
            return PackedRows(self._snapshot.array(array), num_kept(array), shared)

        return {array.name: source(array) for group in self._layout.targets for array in group.rows}
