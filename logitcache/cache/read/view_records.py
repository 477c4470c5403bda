"""What a cache records of the views themselves, read by key."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.read.row_sources import PackedRows, columns_of
from logitcache.cache.read.stored_array import StoredArray
from logitcache.errors import RecipeError, ReplayMismatchError
from logitcache.store.arrays import Shard
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

KEPT_BYTES = 256 << 20
BLOCK = 4096
"""Keys planned at a time."""


class RecordedRows:
    """One recorded array by key. It can be pickled: each process opens and decodes the array itself.

    An epoch asks for one view in any order, or for a few, and at its end for the next: two views are kept decoded, more
    where they take little.
    """

    def __init__(self, stored: StoredArray) -> None:
        self._stored, self._layout = stored, stored.layout

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedRows, (self._stored,)

    def __call__(self, keys: Sequence[ViewKey]) -> NDArray[Any]:
        """Gather the rows of keys that the cache has, [B, *row_shape]."""
        views, indices = columns_of(keys)
        return self._rows.take(views * self._layout.padded + indices)

    @cached_property
    def _rows(self) -> PackedRows:
        array = self._layout
        small = KEPT_BYTES // (array.shard_rows * array.row_bytes)
        return PackedRows(self._stored, num_kept=max(2 * array.shards_per_view, small))


def require_replayable(manifest: Manifest, where: str) -> None:
    """Raise where a cache's parameters cannot be read in place of drawing them."""
    if manifest.views.targets == "linear":
        raise RecipeError(
            f"{where} has linear targets, which are mixed as planned, not as recorded. Fix: leave out replay: recorded"
        )
    if not manifest.parameters:
        why = "its views have none" if manifest.parameters is not None else "it was made without them"
        raise RecipeError(
            f"{where} keeps no parameters to replay: {why}. Fix: leave out replay: recorded; caches made with "
            "record_parameters: true have them"
        )
    here = manifest.views.columns()
    if manifest.parameters != here:
        raise ReplayMismatchError(
            f"{where} keeps the parameters {list(manifest.parameters)},\n  this release replays {list(here)}.\n"
            "  Fix: install the release of logitcache that made the cache"
        )


def require_planned(recorded: RecordedRows, columns: Sequence[str], views: Views, shards: Iterable[Shard]) -> None:
    """Raise ReplayMismatchError naming the first key of `shards` for which this release plans another row.

    `columns` names the recorded numbers.
    """
    spec = views.spec
    if tuple(columns) != spec.columns():
        raise ReplayMismatchError(
            f"the cache recorded the parameters {list(columns)}, this release plans {list(spec.columns())}. {_FIX}"
        )
    sizes, count = views.dataset.sizes(), len(views.dataset.ids)
    for keys in _blocks(shards):
        planned = spec.rows(keys, sizes[[key.index for key in keys]], count)
        found = recorded(keys)
        if not np.array_equal(planned, found):
            row, column = np.argwhere(planned != found)[0].tolist()
            view, index = keys[row]
            raise ReplayMismatchError(
                f"view {view} of image {views.dataset.ids[index]!r} (index {index}) is planned in another way: "
                f"{columns[column]} is {planned[row, column]} here, recorded is {found[row, column]}. {_FIX}"
            )


_FIX = (
    "Fix: replay the recorded parameters (replay: recorded), install the release of logitcache that made the cache, or "
    "precompute again"
)


def _blocks(shards: Iterable[Shard]) -> Iterator[list[ViewKey]]:
    for shard in shards:
        for start in range(shard.start, shard.stop, BLOCK):
            yield [ViewKey(shard.view, index) for index in range(start, min(start + BLOCK, shard.stop))]
