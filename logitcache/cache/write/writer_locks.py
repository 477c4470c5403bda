"""Several writers of one cache: short sections for one alone, a presence that others see, and claims on shards.

All of these are flocks: they end with the process, and depend on no clock. They are on files that the finished cache
has anyway, which are opened and not changed. A lock file beside the cache would be simpler; but it would stay behind
when its process is killed, and need a parent folder that may be written, while a finished cache may only be read.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from logitcache.cache.format.root import ROOT
from logitcache.errors import CacheError
from logitcache.runtime.console import logger
from logitcache.store.base import Store
from logitcache.store.file_locks import is_at, try_lock
from logitcache.store.files import LEFTOVER, explained
from logitcache.store.shards import Shard

PREPARING, WRITING = f"digest/{ROOT}", f"label/{ROOT}"
"""The files whose locks are for one process that prepares or finishes a cache, and for all that write to it."""

_held: set[int] = set()


@contextmanager
def preparing(store: Store) -> Iterator[Path]:
    """Be the only one to prepare or finish a cache, waiting for others that do.

    Yields where to write: the store's folder, or a directory beside it for a new cache, which is removed unless it was
    renamed. The lock goes with a directory that is renamed. Raises CacheError if no cache can be there.
    """
    with ExitStack() as held:
        with explained(store.path):
            target = _locked_target(store, held)
        try:
            yield target
        finally:
            if target != store.path:
                shutil.rmtree(target, ignore_errors=True)


@contextmanager
def try_creating(store: Store) -> Iterator[Path | None]:
    """Hold the directory in which a cache was being created; None if there is none, or a process holds it."""
    target = creating(store.path)
    with ExitStack() as held:
        lock = None
        with explained(target), suppress(FileNotFoundError, NotADirectoryError):
            lock = held.enter_context(_opened(target / PREPARING))
        is_free = lock is not None and try_lock(lock, fcntl.LOCK_EX) and is_at(lock, target / PREPARING)
        yield target if is_free else None


@contextmanager
def writing(store: Store) -> Iterator[None]:
    """Be seen to write to a cache; to begin within `preparing`."""
    with ExitStack() as held:
        with explained(store.path):
            lock = held.enter_context(_opened(store.path / WRITING))
            _wait(lock, fcntl.LOCK_SH, store)
        yield


def alone(store: Store) -> bool:
    """Whether no process writes to a cache, this one included, which stays so until `preparing` ends."""
    with suppress(OSError), _opened(store.path / WRITING) as lock:
        return try_lock(lock, fcntl.LOCK_EX) is True
    return False


class Claim:
    """The right to compute a shard, until it is released or the process ends."""

    def __init__(self, store: Store, shard: Shard) -> None:
        self._file = store.path / "digest" / f"claim.{shard.view}.{shard.start}{LEFTOVER}"
        self._held = ExitStack()

    def take(self) -> bool:
        """Claim the shard; False if another process has it."""
        while True:
            with ExitStack() as held, explained(self._file):
                lock = held.enter_context(_opened(self._file, create=True))
                if try_lock(lock, fcntl.LOCK_EX) is False:
                    return False
                # Another may have released it, and with it removed the file, before it was locked here.
                if is_at(lock, self._file):
                    self._held = held.pop_all()
                    self._held.callback(self._remove)
                    return True

    def is_held(self) -> bool:
        """Whether a running process has claimed the shard."""
        with explained(self._file), suppress(FileNotFoundError), _opened(self._file) as lock:
            return try_lock(lock, fcntl.LOCK_EX) is False
        return False

    def release(self) -> None:
        """Let others compute the shard."""
        self._held.close()

    def _remove(self) -> None:
        with suppress(OSError):  # a file without a lock claims nothing, and is removed later
            self._file.unlink(missing_ok=True)


def _locked_target(store: Store, held: ExitStack) -> Path:
    """Lock the directory to write to, and return it."""
    path = store.path
    while True:
        target = target_of(store)
        with ExitStack() as opened:
            if target != path:
                target.mkdir(parents=True, exist_ok=True)
            try:
                if target != path:
                    (target / PREPARING).parent.mkdir(exist_ok=True)
                # In what may be no cache, nothing is made before it is known to be one.
                file = target / PREPARING if target != path or (target / PREPARING).is_file() else target
                lock = opened.enter_context(_opened(file, create=target != path))
            except FileNotFoundError:
                continue  # another run renamed or removed the directory that was just made or found
            _wait(lock, fcntl.LOCK_EX, store)
            is_current = is_at(lock, file)
            if is_current and target_of(store) == target:
                held.enter_context(opened.pop_all())
                return target
            if is_current and target != path:
                # It came after the rename, and is nobody's.
                shutil.rmtree(target, ignore_errors=True)


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


@contextmanager
def _opened(file: Path, *, create: bool = False) -> Iterator[int]:
    """Open a file to lock it. Network disks lock only what may be written."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
        lock = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    _held.add(lock)
    try:
        yield lock
    finally:
        if lock in _held:  # not in a forked worker
            _held.discard(lock)
            os.close(lock)


def _wait(lock: int, kind: int, store: Store) -> None:
    """Wait for a lock; report that it is waited for, or that this file system has none."""
    got = try_lock(lock, kind)
    if got is False:
        logger.info(f"waiting for another run, which prepares or finishes {store}")
        fcntl.flock(lock, kind)
    elif got is None:
        logger.info(
            f"{store.path} lies on a file system without file locks: let no two processes write it at once, "
            "unless it is there and each has a --part of its own"
        )


def _forget_locks() -> None:
    """Close a parent's locks in a forked worker, which would hold them on when the parent is killed."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)
