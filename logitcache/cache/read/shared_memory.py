"""Decoded shards in memory that the processes and runs of one machine share: each is there once.

They are files of a memory file system, in a folder that only the user may enter, named after the bytes that they were
decoded from. A file appears whole or not at all, so that a process may be killed at any moment: the next one uses
these files, and removes the least recently used if they take more than the limit. The last process to end removes
all. A file that is removed stays readable where it is mapped.
"""

import atexit
import fcntl
import hashlib
import math
import mmap
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.store.bounded_folder import BoundedFolder, size_limit
from logitcache.store.file_locks import locked_partial

VARIABLE = "LOGITCACHE_SHARED_MEMORY"
"""The environment variable that bounds them: a number of bytes, which may end in K, M or G; 0 shares nothing."""

MEMORY = Path("/dev/shm")

_COMPARED = b"compared\n"
"""Earlier releases shared shards that they had not compared, under names without this."""

Decode = Callable[[], NDArray[Any]]


class SharedShards:
    """Decoded shards by name, in a folder of at most `limit` bytes; removed ones that are still mapped come on top."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = BoundedFolder(folder, limit)

    def get(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], decode: Decode) -> NDArray[Any]:
        """Return a shard, [rows, *row_shape], decoded here unless another process did, and shared if there is room."""
        size = math.prod(shape) * dtype.itemsize
        found = self._mapped(name, size) or self._made(name, size, decode)
        return np.frombuffer(found, dtype).reshape(shape)

    def _mapped(self, name: str, size: int) -> mmap.mmap | None:
        with suppress(OSError, ValueError), open(self._folder.path / name, "rb", opener=_open_no_link) as file:
            if os.fstat(file.fileno()).st_size == size:
                with suppress(OSError):
                    os.utime(file.fileno())
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return None

    def _made(self, name: str, size: int, decode: Decode) -> mmap.mmap | memoryview:
        """Decode a shard and keep it; processes that need it meanwhile wait, and find it."""
        with ExitStack() as held:
            part = None
            if size <= self._folder.limit:
                with suppress(OSError):
                    part = held.enter_context(locked_partial(self._folder.path / name))
            if part is not None and (found := self._mapped(name, size)) is not None:
                return found
            rows = np.ascontiguousarray(decode()).data
            if part is not None:
                with suppress(OSError), self._folder.reserved(size):  # no memory for it here
                    part.finish(rows)
                    return self._mapped(name, size) or rows
            return rows


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def shared_limit(memory: Path = MEMORY) -> int:
    """Return how many bytes of decoded shards may be shared: a quarter of the memory file system by default.

    Raises RecipeError if the environment variable is not a size.
    """
    try:
        return size_limit(memory, VARIABLE)
    except OSError:
        return 0


def shared_shards(memory: Path = MEMORY) -> SharedShards | None:
    """Return this user's shared shards; None if nothing may be shared."""
    limit = shared_limit(memory)
    if limit == 0:
        return None
    folder = memory / f"logitcache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Another user's folder of this name may hold anything.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        return None
    if folder not in _present:
        with suppress(OSError):
            _present[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(_present[folder], fcntl.LOCK_SH)
            atexit.register(_leave, folder, os.getpid())
    return SharedShards(folder, limit)


_present: dict[Path, int] = {}
"""Folders that this process uses, with a shared lock on each, which ends with the process."""


def _leave(folder: Path, process: int) -> None:
    """Remove everything, unless another process uses it."""
    with suppress(OSError):
        if process == os.getpid():
            fcntl.flock(_present[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in os.scandir(folder):
                os.unlink(entry.path)


def name_of(*parts: bytes) -> str:
    """Return the name of what was decoded from bytes that these decide, and that were compared with them."""
    digest = hashlib.sha256(_COMPARED)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
