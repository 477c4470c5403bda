"""Map all shard files of a hot array into one address range: one NumPy array over the whole store."""

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.layout import PAGE, ArrayLayout, Shard
from logitcache.errors import CacheError

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    mapped: int | None = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if mapped is None or mapped == _MAP_FAILED:
        raise CacheError(
            f"{size} bytes of the cache cannot be mapped: {os.strerror(ctypes.get_errno())}. "
            "Fix: allow the process more address space (ulimit -v), or store {storage: packed}"
        )
    return mapped


def map_rows(root: Path, array: ArrayLayout, shards: list[Shard]) -> NDArray[Any]:
    """Map `shards` read-only as [num_views * padded rows, *row_shape]; row `view * padded + index` is a key's.

    The address range of shards that are not given is reserved, not readable. Sizes are checked before anything is
    mapped: a row past the end of a truncated file would kill the process.
    """
    shard_bytes = array.shard_rows * array.row_bytes
    assert shard_bytes % PAGE == 0
    per_view = -(-array.num_images // array.shard_rows)
    total = array.num_views * per_view * shard_bytes
    base = _map(None, total, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    memory = (ctypes.c_uint8 * total).from_address(base)
    # Not when the interpreter ends: other threads may still read, and the memory goes with the process.
    weakref.finalize(memory, _libc.munmap, base, total).atexit = False
    for shard in shards:
        number = shard.view * per_view + shard.start // array.shard_rows
        _map_file(root / array.file(shard), array, shard, base + number * shard_bytes)
    rows: NDArray[Any] = np.frombuffer(memory, dtype=array.dtype).reshape(-1, *array.row_shape)  # type: ignore[call-overload]
    rows.flags.writeable = False
    return rows


def _map_file(path: Path, array: ArrayLayout, shard: Shard, address: int) -> None:
    rows = shard.stop - shard.start
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise CacheError(
            f"{path}: {error.strerror}. Fix: run `logitcache precompute` again, it writes what is missing"
        ) from error
    try:
        size, expected = os.fstat(descriptor).st_size, array.hot_bytes(rows)
        if size != expected:
            raise CacheError(
                f"{path} has {size} bytes, its layout needs {expected}. Fix: run the same "
                "`logitcache precompute` command again, it rewrites this shard"
            )
        needed = -(-rows * array.row_bytes // PAGE) * PAGE
        _map(address, needed, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
    finally:
        os.close(descriptor)
