"""Several writers of one cache: short sections for one alone, a presence that others see, and claims on shards.

All of these are flocks: they end with the process, and depend on no clock. They lie on files that the finished cache
has anyway, which are opened and not changed, so that nothing of them remains.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from logitcache.cache.format.metadata import ROOT
from logitcache.errors import CacheError
from logitcache.runtime.console import logger
from logitcache.store.base import Store
from logitcache.store.file_locks import is_at
from logitcache.store.files import LEFTOVER, fix_of
from logitcache.store.shards import Shard

PREPARING, WRITING = f"digest/{ROOT}", f"label/{ROOT}"
"""Whose lock is for one process that prepares or finishes a cache, and for all that write to it."""

MOST_MISSED = 1000
"""How often a directory may be gone that was just made; more often it cannot be made, and no other run removes it."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_held: set[int] = set()


@contextmanager
def preparing(store: Store) -> Iterator[Path]:
    """Be the only one to prepare or finish a cache, waiting for others that do.

    Yields where to write: the store's folder, or a directory beside it for a new cache, which is removed unless it was
    renamed. The lock goes with a directory that is renamed. Raises CacheError where no cache can be.
    """
    with explained(store.path):
        lock, target = _lock(store)
    try:
        yield target
    finally:
        if target != store.path:
            shutil.rmtree(target, ignore_errors=True)
        _release(lock)


@contextmanager
def try_creating(store: Store) -> Iterator[Path | None]:
    """Hold the directory in which a cache was being created, where there is one that no process holds; else None."""
    lock = None
    target = creating(store.path)
    with explained(target), suppress(FileNotFoundError, NotADirectoryError):
        lock = _open(target / PREPARING)
    try:
        yield target if lock is not None and _try(lock, fcntl.LOCK_EX) and is_at(lock, target / PREPARING) else None
    finally:
        if lock is not None:
            _release(lock)


@contextmanager
def writing(store: Store) -> Iterator[None]:
    """Be seen to write to a cache; to begin within `preparing`."""
    with explained(store.path):
        lock = _open(store.path / WRITING)
        _flock(lock, fcntl.LOCK_SH, store)
    try:
        yield
    finally:
        _release(lock)


def alone(store: Store) -> bool:
    """Whether no process writes to a cache, this one included, which stays so until `preparing` ends."""
    try:
        lock = _open(store.path / WRITING)
    except OSError:
        return False
    try:
        return _try(lock, fcntl.LOCK_EX) is True
    finally:
        _release(lock)


class Claim:
    """The right to compute a shard, until it is released or the process ends."""

    def __init__(self, store: Store, shard: Shard) -> None:
        self._file = store.path / "digest" / f"claim.{shard.view}.{shard.start}{LEFTOVER}"
        self._lock: int | None = None

    def take(self) -> bool:
        """Claim the shard; False where another process has it."""
        while True:
            with explained(self._file):
                lock = _open(self._file, create=True)
                free = _try(lock, fcntl.LOCK_EX)
            if free is False:
                _release(lock)
                return False
            # Another may have released it, and with it removed the file, before it was locked here.
            if is_at(lock, self._file):
                self._lock = lock
                return True
            _release(lock)

    def is_held(self) -> bool:
        """Whether a running process has claimed the shard."""
        with explained(self._file):
            try:
                lock = _open(self._file)
            except FileNotFoundError:
                return False
        try:
            return _try(lock, fcntl.LOCK_EX) is False
        finally:
            _release(lock)

    def release(self) -> None:
        """Let others see to the shard."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):  # a file without a lock claims nothing, and is removed later
                self._file.unlink(missing_ok=True)
            _release(lock)


def _lock(store: Store) -> tuple[int, Path]:
    missed = 0
    while True:
        target = target_of(store)
        try:
            lock = _lock_at(target, store)
        except FileNotFoundError:
            # Another run may rename or remove the directory before it is locked here: then look again.
            missed += 1
            if missed == MOST_MISSED:
                raise
            continue
        if lock is not None:
            return lock, target


def _lock_at(target: Path, store: Store) -> int | None:
    """Lock the directory to write to; None where it has become another one meanwhile."""
    path = store.path
    if target != path:
        (target / PREPARING).parent.mkdir(parents=True, exist_ok=True)
    # In what may be no cache, nothing is made before it is known to be one.
    file = target / PREPARING if target != path or (target / PREPARING).is_file() else target
    lock = _open(file, create=target != path)
    try:
        _flock(lock, fcntl.LOCK_EX, store)
        if target_of(store) == target and is_at(lock, file):
            return lock
    except BaseException:
        _release(lock)
        raise
    if target != path and is_at(lock, file):
        # It came after the rename, and is nobody's.
        shutil.rmtree(target, ignore_errors=True)
    _release(lock)
    return None


def target_of(store: Store) -> Path:
    """Return where to write a cache: the store's folder if it is there; raise CacheError if something else is."""
    path = store.path
    if (path / ROOT).exists():
        return path
    if os.path.lexists(path) and (not path.is_dir() or path.is_symlink() or any(path.iterdir())):
        raise CacheError(f"{path} exists and is no cache: nothing is overwritten. Fix: name another path, or remove it")
    if not _is_named(path):
        raise CacheError(
            f"a new cache replaces an empty folder, which '{path}' does not name. Fix: name it, as '{path.resolve()}'"
        )
    return creating(path)


def creating(path: Path) -> Path:
    """Return where a new cache is put together before it appears at `path`."""
    path = path if _is_named(path) else path.resolve()
    return path.parent / f"{path.name}.creating"


def _is_named(path: Path) -> bool:
    """Whether a path ends in the name of a folder, and not in `.` or `..`."""
    return path.name not in ("", "..")


def _open(file: Path, create: bool = False) -> int:
    """Open a file to lock it. Network disks lock only what may be written."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
        lock = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    _held.add(lock)
    return lock


def _release(lock: int) -> None:
    if lock in _held:
        _held.discard(lock)
        os.close(lock)


def _flock(lock: int, kind: int, store: Store) -> None:
    """Wait for a lock; say that it is waited for, or that this file system has none."""
    got = _try(lock, kind)
    if got is False:
        logger.info(f"waiting for another run, which prepares or finishes {store}")
        fcntl.flock(lock, kind)
    elif got is None:
        logger.info(
            f"{store.path} lies on a file system without file locks: let no two processes write it at once, "
            "unless it is there and each has a --part of its own"
        )


def _try(lock: int, kind: int) -> bool | None:
    """Lock without waiting; None where there are no locks."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


def _forget_locks() -> None:
    """Close a parent's locks in a forked worker, which would hold them on when the parent is killed."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system says into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error.strerror}. Fix: {fix_of(error) or 'remove the cause'}"
        ) from error
