"""Decoded shards and images in memory that the processes and runs of one machine share: each is there once.

They are files of a memory file system, in a folder that only the user may enter, named after the bytes that they were
decoded from. A file appears whole or not at all, so that a process may be killed at any moment: the next one uses
these files, and removes the least recently used if they take more than the limit. The last process to end removes
all, as do worker processes whose main process was killed. A file that is removed stays readable where it is mapped.
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

DecodeShard = Callable[[], NDArray[Any]]


class SharedShards:
    """Decoded shards by name, in a folder of at most `limit` bytes; removed ones that are still mapped come on top."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self.limit = BoundedFolder(folder, limit), limit

    def fillable(self, name: str, size: int) -> int:
        """Open a file of so many bytes, zeros at first, that all processes write to; raise OSError without room."""
        path = self._folder.path / name
        with locked_partial(path) as part:
            if not path.is_file() or path.lstat().st_size != size:
                with self._folder.reserved(size):
                    part.finish(bytes(size))  # no hole: a process that fills one is killed where memory ends
            os.utime(path)
            return _open_no_link(str(path), os.O_RDWR | os.O_CLOEXEC)

    def get(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], decode: DecodeShard) -> NDArray[Any]:
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

    def _made(self, name: str, size: int, decode: DecodeShard) -> mmap.mmap | memoryview:
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


def shared_limit(memory: Path | None = None) -> int:
    """Return how many bytes of decoded shards may be shared: a quarter of the memory file system by default.

    Raises RecipeError if the environment variable is not a size.
    """
    try:
        return size_limit(memory or MEMORY, VARIABLE)
    except OSError:
        return 0


def shared_shards(memory: Path | None = None) -> SharedShards | None:
    """Return this user's shared shards; None if nothing may be shared."""
    limit = shared_limit(memory)
    if limit == 0:
        return None
    folder = (memory or MEMORY) / f"logitcache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Another user's folder of this name may hold anything.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        return None
    if (folder, os.getpid()) not in _present:
        with suppress(OSError):
            _present[folder, os.getpid()] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(_present[folder, os.getpid()], fcntl.LOCK_SH)
    return SharedShards(folder, limit)


_present: dict[tuple[Path, int], int] = {}
"""Folders that this process uses, with a shared lock on each, which ends with the process; and those of its parents."""


@atexit.register
def leave() -> None:
    """Remove everything, unless another process uses it."""
    for (folder, process), lock in list(_present.items()):
        del _present[folder, process]
        with suppress(OSError):
            if process == os.getpid():
                fcntl.flock(lock, fcntl.LOCK_UN)  # first: of two that end at once, one then finds itself alone
            os.close(lock)  # that of a parent, too, which a fork holds a copy of
            alone = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in os.scandir(folder):
                os.unlink(entry.path)


def name_of(*parts: bytes) -> str:
    """Return the name of what was decoded from bytes that these decide, and that were compared with them."""
    digest = hashlib.sha256(_COMPARED)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
