"""Sources of rows: hot arrays are read in place, packed ones are decoded here by whole shards, ahead of their use."""

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.read.stored_array import StoredArray
from logitcache.store.shards import Shard
from logitcache.store.shared_memory import SharedShards, name_of
from logitcache.views.keys import ViewKey, columns_of

PACKED_SHARDS = 8
KEPT_BYTES = 1 << 30
"""Each packed array keeps this many decoded shards at least, and more if they take less memory than this."""

RECORDED_BYTES = 256 << 20
"""Memory within which more than two views of a recorded array are kept decoded."""


class RowSource(ABC):
    """Rows of one array by place: `view * padded + index`, where every view is padded to whole shards."""

    def prepare(self, view: int) -> None:  # noqa: B027  # nothing, unless views are mapped
        """Make a view ready, before any of its rows is gathered."""

    def forget(self, view: int) -> None:  # noqa: B027
        """Release a view; none of its rows is gathered until it is prepared again."""

    @abstractmethod
    def expect(self, places: NDArray[np.int64]) -> None:
        """Prefetch hint: rows that are gathered next, after those of other arrays."""

    @abstractmethod
    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, [B, *row_shape]."""


def num_kept(layout: ArrayLayout) -> int:
    """Return how many decoded shards of a packed array are kept."""
    return max(PACKED_SHARDS, KEPT_BYTES // (layout.shard_rows * layout.row_bytes))


class PackedRows(RowSource):
    """Rows of decoded shards, the least recently used of which are forgotten.

    Where batches are expected, a thread decodes the rest of a view that is begun, then the view after it, in half of
    the room.
    """

    def __init__(self, stored: StoredArray, num_kept: int, shared: SharedShards | None = None) -> None:
        self._stored, self._layout = stored, stored.layout
        self._num_kept, self._shared = num_kept, shared
        self._per_view, self._padded = self._layout.shards_per_view, self._layout.padded
        self._begin()

    def _begin(self) -> None:
        # A fork has neither the threads of its parent nor what they were about to decode.
        self._process = os.getpid()
        self._decoded: OrderedDict[int, Future[NDArray[Any]]] = OrderedDict()
        self._changing = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._view = -1

    def expect(self, places: NDArray[np.int64]) -> None:
        """Begin to decode the rest of the view of a batch, and the view after it."""
        if self._process != os.getpid():
            self._begin()
        if len(places):
            self._decode_ahead(int(places[-1]) // self._padded)

    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, [B, *row_shape]."""
        if self._process != os.getpid():
            self._begin()
        rows = np.empty((len(places), *self._layout.row_shape), self._layout.dtype)
        if not len(places):
            return rows
        numbers, inside = np.divmod(places, self._layout.shard_rows)
        order = np.argsort(numbers, kind="stable")
        needed, starts = np.unique(numbers[order], return_index=True)
        bounds = [*starts.tolist(), len(order)]
        # Shards of a remote cache are downloaded together.
        missing = [self._numbered(number) for number in needed.tolist() if number not in self._decoded]
        if missing:
            self._stored.ensure(missing)
        for number, start, stop in zip(needed.tolist(), bounds[:-1], bounds[1:], strict=True):
            mine = order[start:stop]
            rows[mine] = self._shard(number).take(inside[mine], axis=0)
        return rows

    def _decode_ahead(self, view: int) -> None:
        if view == self._view:
            return
        self._view = view
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="logitcache-ahead")
        total = self._layout.num_views * self._per_view
        first, count = view * self._per_view, min(2 * self._per_view, self._num_kept // 2, total)
        self._thread.submit(self._decode_of, view, [number % total for number in range(first, first + count)])

    def _decode_of(self, view: int, numbers: list[int]) -> None:
        for number in numbers:
            if view != self._view:
                return
            self._shard(number)  # errors are raised again when the rows are gathered

    def _shard(self, number: int) -> NDArray[Any]:
        with self._changing:
            decoded = self._decoded.get(number)
            is_new = decoded is None
            if decoded is None:
                decoded = self._decoded[number] = Future()
            self._decoded.move_to_end(number)
            while len(self._decoded) > self._num_kept:
                self._decoded.popitem(last=False)
        if is_new:
            try:
                decoded.set_result(self._load(number))
            except BaseException as error:
                self._decoded.pop(number, None)
                decoded.set_exception(error)
        return decoded.result()

    def _numbered(self, number: int) -> Shard:
        view, place = divmod(number, self._per_view)
        start = place * self._layout.shard_rows
        return Shard(view, start, min(start + self._layout.shard_rows, self._layout.num_images))

    def _load(self, number: int) -> NDArray[Any]:
        shard, layout = self._numbered(number), self._layout
        if self._shared is None:
            return self._stored.rows(shard)
        # Whatever has this name was decoded from bytes that matched this record.
        name = name_of(layout.file(shard).encode(), self._stored.metadata, self._stored.stored(shard).record)
        shape = (shard.stop - shard.start, *layout.row_shape)
        return self._shared.get(name, shape, layout.dtype, lambda: self._stored.rows(shard))


class RecordedRows:
    """One recorded array by key. It can be pickled: each process opens and decodes the array itself.

    An epoch asks for one view in any order, or for a few, and at its end for the next: two views are kept decoded, more
    if they take little.
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
        small = RECORDED_BYTES // (array.shard_rows * array.row_bytes)
        return PackedRows(self._stored, num_kept=max(2 * array.shards_per_view, small))
