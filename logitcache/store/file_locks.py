"""Locks between the processes of a machine: files that one process makes and others wait for, and take turns over.

All are flocks: they end with the process.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
"""Suffix of the name of a file while it is written."""

_POLL_SECONDS = 0.1
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


@contextmanager
def locked(path: Path, flags: int = os.O_RDONLY, *, wait: bool = True) -> Iterator[int]:
    """Open a file or a folder and hold its lock; without `wait` raise BlockingIOError if another process has it."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


class PartialFile:
    """A file that is written beside its place, under a lock, and renamed when it is whole."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor

    def finish(self, data: bytes | memoryview) -> None:
        """Write the bytes of the file and put it in place."""
        os.ftruncate(self._descriptor, 0)
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(self._descriptor, left) :]
        _part_of(self._file).rename(self._file)


@contextmanager
def locked_partial(file: Path) -> Iterator[PartialFile]:
    """Open the part of a file once no other process has it; after a wait look first whether the file is there."""
    part = _part_of(file)
    while True:
        with locked(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as descriptor:
            # Another process may have renamed or removed it before it was locked here: then open it again.
            if is_at(descriptor, part):
                try:
                    yield PartialFile(file, descriptor)
                finally:
                    with suppress(OSError):
                        _remove_if_at(descriptor, part)  # not finished
                return


def remove_abandoned(part: Path) -> None:
    """Remove a part that no living process is writing."""
    with suppress(BlockingIOError), locked(part, os.O_RDONLY | os.O_NOFOLLOW, wait=False) as descriptor:
        _remove_if_at(descriptor, part)


def _part_of(file: Path) -> Path:
    return file.with_name(file.name + PART)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_if_at(descriptor: int, path: Path) -> None:
    if is_at(descriptor, path):
        path.unlink()


@contextmanager
def turn(kept_at: Path | None, given_up: threading.Event) -> Iterator[None]:
    """Wait for another process that is about to keep something at a path, or until `given_up` is set.

    It only saves work: if nothing is kept, or the file system has no locks, no process waits.
    """
    lock = _open_turn(kept_at)
    try:
        while lock is not None and try_lock(lock) is False and not given_up.wait(_POLL_SECONDS):
            pass
        yield
    finally:
        if lock is not None:
            Path(f"{kept_at}.turn").unlink(missing_ok=True)  # processes that wait have it open
            os.close(lock)


def _open_turn(kept_at: Path | None) -> int | None:
    if kept_at is not None:
        with suppress(OSError):
            kept_at.parent.mkdir(parents=True, exist_ok=True)
            return os.open(f"{kept_at}.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return None


def try_lock(lock: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Lock without waiting; None if the file system has no locks."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True
