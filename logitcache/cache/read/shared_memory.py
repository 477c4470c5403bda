"""Decoded shards in memory that the processes and runs of one machine share: each is there once.

They are files of a memory file system, in a folder that only the user may enter, named after the bytes that they were
decoded from. A file appears whole or not at all, so that a process may be killed at any moment: the next one uses
what is there, and removes the least recently used where they take more than the limit. The last process to end removes
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

from logitcache.store.bounded_folder import Held, make_room, quarter_of, told_size
from logitcache.store.file_locks import PART, Part, locked_part, remove_abandoned

VARIABLE = "LOGITCACHE_SHARED_MEMORY"
"""The environment variable that bounds them: a number of bytes, which may end in K, M or G; 0 shares nothing."""

MEMORY = Path("/dev/shm")

_COMPARED = b"compared\n"
"""Earlier releases shared shards that they had not compared, under names without this."""

Decode = Callable[[], NDArray[Any]]


class SharedShards:
    """Decoded shards by name, in a folder of at most `limit` bytes; removed ones that are still mapped come on top."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit

    def get(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], decode: Decode) -> NDArray[Any]:
        """Return a shard, [rows, *row_shape], decoded here unless another process did; where there is room, shared."""
        wanted = math.prod(shape) * dtype.itemsize
        found = self._mapped(name, wanted) or self._made(name, wanted, decode)
        return np.frombuffer(found, dtype).reshape(shape)

    def _mapped(self, name: str, wanted: int) -> mmap.mmap | None:
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != wanted:
                return None
            with suppress(OSError):
                os.utime(descriptor)
            return mmap.mmap(descriptor, wanted, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)

    def _made(self, name: str, wanted: int, decode: Decode) -> mmap.mmap | memoryview:
        """Decode a shard and keep it; whoever comes meanwhile waits, and finds it."""

        def decoded() -> memoryview:
            return np.ascontiguousarray(decode()).data

        if wanted > self._limit:
            return decoded()
        with ExitStack() as held:
            try:
                part = held.enter_context(locked_part(self._folder / name))
            except OSError:
                return decoded()
            return self._mapped(name, wanted) or self._written(name, wanted, part, decoded())

    def _written(self, name: str, wanted: int, part: Part, rows: memoryview) -> mmap.mmap | memoryview:
        with suppress(OSError):  # no memory for it here
            self._make_room(wanted)
            part.finish(rows)
            return self._mapped(name, wanted) or rows
        return rows

    def _make_room(self, wanted: int) -> None:
        """Remove what killed processes left, then the least recently used, until `wanted` more bytes fit."""
        held = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(PART):
                    remove_abandoned(Path(entry.path))
                status = entry.stat(follow_symlinks=False)
                held.append(Held(status.st_mtime, status.st_size, entry.path))
        make_room(held, self._limit - sum(file.size for file in held), wanted)


def shared_limit(memory: Path = MEMORY) -> int:
    """Return how many bytes of decoded shards may be shared: a quarter of the memory file system, unless told.

    Raises RecipeError where the environment variable is no size.
    """
    told = told_size(VARIABLE)
    if told is not None:
        return told
    try:
        return quarter_of(memory)
    except OSError:
        return 0


def shared_shards(memory: Path = MEMORY) -> SharedShards | None:
    """Return this user's shared shards; None where nothing may be shared."""
    limit = shared_limit(memory)
    if limit == 0:
        return None
    folder = memory / f"logitcache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Somebody else's folder of this name may hold anything.
    safe = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not safe:
        return None
    _be_present(folder)
    return SharedShards(folder, limit)


_present: dict[Path, int] = {}


def _be_present(folder: Path) -> None:
    """Show other processes that this one uses the folder; a lock, which ends with the process."""
    if folder in _present:
        return
    with suppress(OSError):
        _present[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(_present[folder], fcntl.LOCK_SH)
        atexit.register(_leave, folder, os.getpid())


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
