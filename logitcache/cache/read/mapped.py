"""Map the shard files of a hot array into one address range: one NumPy array over the whole store."""

import ctypes
import math
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import PAGE, ArrayLayout
from logitcache.cache.read.row_sources import RowSource
from logitcache.cache.read.stored_array import StoredArray
from logitcache.errors import CacheError
from logitcache.store.shards import Shard

HUGE_PAGE = 2 << 20
MOST_ADDRESSES = 1 << 44
"""Of 2^47 that a process has."""

LONG_ROW = 256
"""Bytes of a row from which it is worth 2 us a batch to find its place behind gaps."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_ADVISED, _UNASKED = 64, 16
"""Batches whose pages are advised at once if they are not in memory, and batches between two tests of that."""

_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    mapped: int | None = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if mapped is None or mapped == _MAP_FAILED:
        raise CacheError(
            f"{size} bytes of the cache cannot be mapped: {os.strerror(ctypes.get_errno())}. "
            "Fix: allow the process more address space (ulimit -v) or more mappings (sysctl vm.max_map_count), or "
            "store {storage: packed}"
        )
    return mapped


def _rows_to_huge_page(array: ArrayLayout, num_shards: int) -> int:
    """Return how many rows to leave free after each shard so that the next begins at a huge page; 0 if not worth it.

    Shards begin at whole rows: what lies between them is a multiple of both.
    """
    size = array.shard_rows * array.row_bytes
    step = math.lcm(HUGE_PAGE, array.row_bytes)
    stride = -(-size // step) * step
    is_worth_it = array.row_bytes >= LONG_ROW and size >= HUGE_PAGE and stride * num_shards <= MOST_ADDRESSES
    return (stride - size) // array.row_bytes if is_worth_it else 0


class MappedRows(RowSource):
    """Rows of shard files in one address range, of which all is reserved at once, and a view mapped when first needed.

    `rows` is one array over the range. Where rows are long and shards large each shard begins at a huge page, if there
    are enough addresses for that: a file whose pages the kernel keeps in blocks of 2 MiB is then mapped by blocks,
    which a random row finds in a quarter less time. Between shards lie rows that are no memory.
    """

    def __init__(self, stored: StoredArray, shards: Iterable[Shard]) -> None:
        self._stored, self._array = stored, stored.layout
        array = stored.layout
        assert array.shard_rows * array.row_bytes % PAGE == 0
        num_shards = array.num_views * array.shards_per_view
        self._gap = _rows_to_huge_page(array, num_shards)
        self._stride = (array.shard_rows + self._gap) * array.row_bytes
        total = num_shards * self._stride
        reserved = _map(None, total + HUGE_PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._base = -(-reserved // HUGE_PAGE) * HUGE_PAGE
        memory = (ctypes.c_uint8 * total).from_address(self._base)
        # Not when the interpreter ends: other threads may still read, and the memory goes with the process.
        weakref.finalize(memory, _libc.munmap, reserved, total + HUGE_PAGE).atexit = False
        self._shards: dict[int, list[Shard]] = {}
        for shard in shards:
            self._shards.setdefault(shard.view, []).append(shard)
        self._mapped: set[int] = set()
        self._mapping = threading.Lock()
        self._left_to_advise, self._left_unasked = 1, 1
        rows: NDArray[Any] = np.frombuffer(memory, dtype=array.dtype).reshape(-1, *array.row_shape)  # type: ignore[call-overload]
        rows.flags.writeable = False
        self.rows = rows

    def prepare(self, view: int) -> None:
        """Map the shards of a view, unless they are."""
        with self._mapping:
            if view not in self._mapped:
                for shard in self._shards.get(view, ()):
                    self._map_file(shard)
                self._mapped.add(view)

    def forget(self, view: int) -> None:
        """Unmap a view: a file that was removed meanwhile takes no more of the disk."""
        with self._mapping:
            if view in self._mapped:
                for shard in self._shards.get(view, ()):
                    address, size = self._range(shard)
                    _map(address, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1)
                self._mapped.remove(view)

    def expect(self, places: NDArray[np.int64]) -> None:
        """Advise the kernel of all pages of a batch at once, if pages are not in memory.

        Advised pages count as no faults: every now and then a batch goes without, to count them.
        """
        if self._left_to_advise:
            self._left_to_advise -= 1
            self._advise(self._rows_at(places))

    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows of views that are prepared, [B, *row_shape]; any other address ends the process."""
        if self._gap:
            places = self._rows_at(places)
        self._left_unasked -= 1
        if self._left_to_advise or self._left_unasked > 0:
            return self.rows.take(places, axis=0)
        self._left_unasked, before = _UNASKED, _disk_faults()
        rows = self.rows.take(places, axis=0)
        if (_disk_faults() - before) * 8 > len(places):
            self._left_to_advise, self._left_unasked = _ADVISED, 1
        return rows

    def _rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which rows of the range lie at places."""
        return places + places // self._array.shard_rows * self._gap if self._gap else places

    def _map_file(self, shard: Shard) -> None:
        """Map a shard; a row past the end of a truncated file would kill the process, so its size is checked before."""
        size, expected = self._stored.stored(shard).size, self._array.hot_bytes(shard.stop - shard.start)
        if size < expected:  # a longer one is of a cache that grew since
            where = f"{self._stored.store}/{self._array.file(shard)}"
            raise CacheError(f"{where} has {size} bytes, its layout needs {expected}. {self._stored.fix}")
        address, needed = self._range(shard)
        with open(self._stored.open(shard), "rb") as file:
            _map(address, needed, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file.fileno())
        # Read-ahead around a random row would read many times the row.
        _libc.madvise(address, needed, mmap.MADV_RANDOM)

    def _range(self, shard: Shard) -> tuple[int, int]:
        """Return the address of a shard and the bytes of its pages."""
        number = shard.view * self._array.shards_per_view + shard.start // self._array.shard_rows
        rows = shard.stop - shard.start
        return self._base + number * self._stride, -(-rows * self._array.row_bytes // PAGE) * PAGE

    def _advise(self, rows: NDArray[np.int64]) -> None:
        """Let the disk read the pages of rows all at once."""
        row_bytes = self._array.row_bytes
        starts = np.sort(rows) * row_bytes
        first, stop = starts // PAGE, (starts + (row_bytes - 1)) // PAGE + 1
        for page, after in np.unique(np.stack([first, stop], axis=1), axis=0).tolist():
            _libc.madvise(self._base + page * PAGE, (after - page) * PAGE, mmap.MADV_WILLNEED)


def _disk_faults() -> int:
    return resource.getrusage(_WHO).ru_majflt
