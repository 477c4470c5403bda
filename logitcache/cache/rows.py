"""Sources of rows: hot arrays are read in place, packed ones are decoded by whole shards."""

from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from logitcache.cache.layout import ArrayLayout, Shard
from logitcache.cache.mapping import map_rows
from logitcache.errors import CacheError

PACKED_SHARDS = 8
"""Decoded shards that each packed array keeps."""


class RowSource(Protocol):
    """Rows of one array by view and index."""

    def take(self, views: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, [B, *row_shape]."""


class HotRows:
    """Rows in place: one gather over one mapping serves a batch."""

    def __init__(self, root: Path, layout: ArrayLayout, shards: list[Shard]) -> None:
        self._rows = map_rows(root, layout, shards)
        self._view_rows = -(-layout.num_images // layout.shard_rows) * layout.shard_rows

    def take(self, views: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, [B, *row_shape]."""
        return self._rows.take(views * self._view_rows + indices, axis=0)


class PackedRows:
    """Rows of decoded shards, the least recently used of which are forgotten."""

    def __init__(self, root: Path, layout: ArrayLayout, num_kept: int = PACKED_SHARDS) -> None:
        self._root, self._layout = root, layout
        self._shard_rows = layout.shard_rows
        self._shape, self._dtype = layout.row_shape, layout.dtype
        self._room = num_kept
        self._decoded: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()

    def take(self, views: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, [B, *row_shape]."""
        rows = np.empty((len(views), *self._shape), self._dtype)
        places = np.stack([views, indices // self._shard_rows], axis=1)
        for view, number in np.unique(places, axis=0).tolist():
            mine = (places[:, 0] == view) & (places[:, 1] == number)
            rows[mine] = self._shard(view, number)[indices[mine] % self._shard_rows]
        return rows

    def _shard(self, view: int, number: int) -> NDArray[Any]:
        key = (view, number)
        if key not in self._decoded:
            self._decoded[key] = self._decode(view, number)
            while len(self._decoded) > self._room:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(key)
        return self._decoded[key]

    def _decode(self, view: int, number: int) -> NDArray[Any]:
        start = number * self._shard_rows
        shard = Shard(view, start, min(start + self._shard_rows, self._layout.num_images))
        file = self._root / self._layout.file(shard)
        # zarr gives fill values for a file that is not there.
        if not file.is_file():
            raise CacheError(f"{file} is missing. Fix: run `logitcache precompute` again, it writes what is missing")
        try:
            return np.asarray(self._array[view, shard.start : shard.stop])
        except Exception as error:  # zarr and its codecs raise anything for damaged bytes
            raise CacheError(
                f"{file} cannot be decoded: {error}. Fix: run `logitcache precompute` again, it rewrites this shard"
            ) from error

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        return zarr.open_array(LocalStore(self._root / self._layout.name, read_only=True), mode="r")
