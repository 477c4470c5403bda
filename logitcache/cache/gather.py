"""Gather rows by key: from committed shards, once their bytes are compared with their records."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.arrays import ArrayGroup, ArrayLayout, Shard
from logitcache.cache.decoded import shared_shards
from logitcache.cache.layout import Layout
from logitcache.cache.mapping import MappedRows
from logitcache.cache.rows import PackedRows, RowSource, Sharing, columns_of, num_kept
from logitcache.cache.verify import require_intact
from logitcache.errors import CacheError
from logitcache.views.keys import ViewKey


class StoredRows:
    """Rows of all arrays by place. The shards of a view are compared before the first of its rows is given."""

    def __init__(self, root: Path, layout: Layout, shards: Sequence[Shard]) -> None:
        self._root, self._layout, self._committed = root, layout, shards
        self._is_complete = len(shards) == layout.num_shards
        self._padded = layout.shards_per_view * layout.shard_rows
        self._compared: set[int] = set()
        self._prepared: set[int] = set()
        self._is_prepared = False

    def places(self, keys: Sequence[ViewKey]) -> NDArray[np.int64]:
        """Return where the rows of keys lie in every array, [B]; raise for a key that the cache does not have."""
        views, indices = columns_of(keys)
        shape = self._layout.num_views, self._layout.num_images
        try:
            np.ravel_multi_index((views, indices), shape)  # the quickest check that numpy has
        except ValueError:
            low, high = (views.min(), indices.min()), (views.max(), indices.max())
            raise IndexError(
                f"keys run from {tuple(map(int, low))} to {tuple(map(int, high))}; the cache has {shape[0]} views "
                f"of {shape[1]} images"
            ) from None
        if not self._is_complete:
            self._require_committed(views, indices)
        if not self._is_prepared:
            self._prepare(set(views.tolist()) - self._prepared)
        return views * self._padded + indices

    def take(self, places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Gather the rows of the arrays of all targets by array name, [B, *row_shape] each."""
        for source in self._sources.values():
            source.expect(places)
        return {name: source.take(places) for name, source in self._sources.items()}

    def compare(self, views: set[int] | None = None) -> None:
        """Raise CacheError naming the damaged shards of some views, or of all, that were not compared before."""
        new = (self._shards.keys() if views is None else views) - self._compared
        require_intact(self._root, self._layout, [shard for view in sorted(new) for shard in self._shards[view]])
        self._compared |= new

    def _prepare(self, views: set[int]) -> None:
        if views:
            self.compare(views)
            for source in self._sources.values():
                for view in views:
                    source.prepare(view)
            self._prepared |= views
            self._is_prepared = len(self._prepared) == self._layout.num_views

    @cached_property
    def _shards(self) -> dict[int, list[Shard]]:
        """The shards of each view."""
        shards: dict[int, list[Shard]] = {}
        for shard in self._committed:
            shards.setdefault(shard.view, []).append(shard)
        return shards

    def _require_committed(self, views: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        """Raise CacheError for a key of a shard that is not there: its addresses cannot be read."""
        for view, index in zip(views.tolist(), indices.tolist(), strict=True):
            start = index - index % self._layout.shard_rows
            if all(shard.start != start for shard in self._shards.get(view, ())):
                raise CacheError(
                    f"{self._root}: view {view} of image {index} is not committed yet. "
                    "Fix: finish `logitcache precompute`"
                )

    @cached_property
    def _sources(self) -> dict[str, RowSource]:
        shared = shared_shards()

        def source(group: ArrayGroup, position: int, array: ArrayLayout) -> RowSource:
            if array.storage == "hot":
                return MappedRows(self._root, array, self._committed)
            sharing = None if shared is None else Sharing(shared, group, position)
            return PackedRows(self._root, array, num_kept(array), sharing)

        return {
            array.name: source(group, position, array)
            for group in self._layout.targets
            for position, array in enumerate(group.rows)
        }
