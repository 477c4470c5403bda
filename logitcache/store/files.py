"""Files: writes that happen whole or not at all, and digests that are remembered between runs."""

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import CacheError, DataError, LogitCacheError
from logitcache.runtime.console import track
from logitcache.store import file_stamps
from logitcache.store.safe_files import open_regular

_BLOCK = 256  # files a thread takes at a time: enough to hide the cost of handing them out
_SPAN = 1 << 14  # files that are handed out to threads at a time
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # more than cores: network disks answer late
LEFTOVER = ".logitcache-tmp"
"""How the names end of files that matter only while they are written."""

_LONGEST_STEM = 80  # characters of the final name in a temporary one: a name may hold 255 bytes
_KEPT = b"logitcache kept 1\n"

_FIXES = {
    errno.EACCES: "make it readable and writable for you, or name another path",
    errno.EDQUOT: "free space within your quota, or name a path on another disk",
    errno.EEXIST: "name another path, or remove what is there",
    errno.EFBIG: "raise the limit of file sizes of this shell or job (`ulimit -f unlimited`); the disk is not full",
    errno.EISDIR: "name a file, not a folder",
    errno.ELOOP: "name another path: symbolic links lead in a circle",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`), or take fewer num_workers",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOENT: "correct the path, or make what it names",
    errno.ENOSPC: "free space on the disk, or name a path on another",
    errno.ENOTDIR: "name another path: a file lies where a folder should be",
    errno.EPERM: "make it readable and writable for you, or name another path",
    errno.EROFS: "name a path on a disk that can be written",
}

T = TypeVar("T")


class Measure(NamedTuple):
    """What is remembered of files: a name for the place, the verb of the progress line, at most 32 bytes of a file."""

    name: str
    doing: str
    of: Callable[[BinaryIO], bytes]


def write_atomically(path: Path, data: bytes | bytearray | memoryview, sync: bool = True) -> None:
    """Write a file so that readers see the old bytes or the new ones, also after a power cut.

    `sync=False` leaves out the flush to the disk. Raises CacheError when the disk is full or the
    folder may not be written; nothing is left behind then.
    """
    _write_atomically(path, [data], sync)


def _write_atomically(path: Path, blocks: Iterable[bytes | bytearray | memoryview], sync: bool) -> None:
    part = path.with_name(f"{path.name[:_LONGEST_STEM]}.{os.getpid()}-{secrets.token_hex(4)}{LEFTOVER}")
    try:
        with _removed_on_failure(part):
            with open(part, "xb") as file:
                file.writelines(blocks)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        if sync:
            sync_directory(path.parent)
    except OSError as cause:
        raise CacheError(_why_not_written(path, cause)) from cause


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what killed writers left anywhere below a directory; returns the paths.

    The caller must be the only writer there.
    """
    found = leftovers(directory)
    for path in found:
        path.unlink(missing_ok=True)
    return found


def leftovers(directory: Path) -> list[Path]:
    """List what killed writers left, and living ones have, anywhere below a directory."""
    return [Path(parent, name) for parent, _, names in os.walk(directory) for name in names if name.endswith(LEFTOVER)]


def file_digests(
    paths: Sequence[str | Path],
    *,
    what: str,
    fresh: bool = False,
    error: type[LogitCacheError] = DataError,
) -> list[bytes]:
    """Return the sha256 (32 bytes) of each file, hashing only those that changed since last time.

    Stamps and digests are remembered in the user's cache directory. `fresh` reads every byte
    again, for damage that leaves no stamp. `what` names one such file ("image", "shard"). Raises
    `error` for the first file that cannot be read.
    """
    found = remembered(paths, SHA256, what=what, fresh=fresh, error=error)
    return [digest.tobytes() for digest in found]


def remembered(
    paths: Sequence[str | Path],
    measure: Measure,
    *,
    what: str,
    width: int = 32,
    fresh: bool = False,
    error: type[LogitCacheError] = DataError,
) -> NDArray[np.uint8]:
    """Return the first bytes of what `measure` found in each file, [n, width]; only files that changed are opened.

    Paths are asked for when they are needed, some at a time: `paths` may make them then.
    """
    found = np.empty((len(paths), width), np.uint8)
    if not len(paths):
        return found
    store = _index_path(paths, measure.name)
    index = file_stamps.StampIndex(_kept(store) or b"")
    known = np.zeros(len(paths), bool)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), _SPAN):
            span = slice(start, start + _SPAN)
            names = [os.path.abspath(path) for path in paths[span]]
            packed = pool.map(lambda block: _stamp_rows(block, what, error), _pieces(names, _BLOCK))
            rows = file_stamps.as_rows(itertools.chain.from_iterable(packed))
            known[span] = False if fresh else index.fill(rows)
            found[span] = rows["digest"][:, :width]
        todo = np.flatnonzero(~known)
        rows, done = file_stamps.no_rows(len(todo)), 0
        measured = _measured(pool, paths, todo, lambda block: _measured_rows(block, measure, what, error))
        try:
            for row in track(measured, f"{measure.doing} {what}s", len(todo), unit=f"{what}s"):
                rows[done] = row
                done += 1
        finally:
            # A long first pass that is interrupted is not lost.
            if done:
                _keep(store, lambda: index.merged_blocks(rows[:done]))
    found[todo] = rows["digest"][:, :width]
    return found


def _measured(
    pool: ThreadPoolExecutor,
    paths: Sequence[str | Path],
    todo: NDArray[np.int64],
    measure: Callable[[Sequence[str]], file_stamps.Rows],
) -> Iterator[np.void]:
    """Yield the row of each file in turn."""
    for start in range(0, len(todo), _SPAN):
        names = [os.path.abspath(paths[number]) for number in todo[start : start + _SPAN].tolist()]
        for rows in pool.map(measure, _pieces(names, _BLOCK)):
            yield from rows


SHA256 = Measure("stamps", "hashing", lambda file: hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]


def user_cache_directory() -> Path | None:
    """Return the folder for what can be computed again; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the standard says to ignore a relative one
        return Path(named, "logitcache")
    try:
        return Path.home() / ".cache" / "logitcache"
    except RuntimeError:
        return None


def memory_of(name: str, ending: str) -> Path | None:
    """Return where something is kept for a path or a URL; None for a user without a home."""
    directory = user_cache_directory()
    return directory / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{ending}" if directory else None


def keep(path: Path | None, payload: bytes) -> None:
    """Keep bytes that can be computed again, beside their own digest, where that is possible."""
    _keep(path, lambda: [payload])


def _keep(path: Path | None, blocks: Callable[[], Iterable[bytes]]) -> None:
    """Keep bytes that are made block by block, twice: for their digest, which comes first, and to be written."""
    if path is None:
        return
    with contextlib.suppress(OSError, LogitCacheError):
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for block in blocks():
            digest.update(block)
        _write_atomically(path, itertools.chain([_KEPT + digest.digest()], blocks()), sync=False)


def kept(path: Path | None) -> bytes | None:
    """Return bytes kept before; None when there are none or they are damaged."""
    payload = _kept(path)
    return None if payload is None else bytes(payload)


def _kept(path: Path | None) -> memoryview | None:
    """Return the same without a second copy of them."""
    try:
        data = memoryview(path.read_bytes() if path else b"")
    except OSError:
        return None
    head = len(_KEPT) + 32
    payload = data[head:]
    return payload if data[:head] == _KEPT + hashlib.sha256(payload).digest() else None


def _index_path(paths: Sequence[str | Path], ending: str) -> Path | None:
    """Return where the stamps of the folder that holds all of these files are kept, under an ending."""
    # The first and the last in order share what all of them share.
    ends = min(map(os.path.abspath, paths)), max(map(os.path.abspath, paths))
    folder = os.path.commonpath([os.path.dirname(name) for name in ends])
    return memory_of(folder, ending)


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _stamp_rows(names: Sequence[str], what: str, error: type[LogitCacheError]) -> list[bytes]:
    rows = []
    for name in names:
        with _readable(name, what, error):
            status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise error(f"{what} '{name}' is not a regular file. Remove it and run again.")
        rows.append(file_stamps.packed_row(name, file_stamps.stamp(status)))
    return rows


def _measured_rows(names: Sequence[str], measure: Measure, what: str, error: type[LogitCacheError]) -> file_stamps.Rows:
    rows = []
    for name in names:
        with _readable(name, what, error), open_regular(name) as file:
            started = file_stamps.now_ns()
            before = file_stamps.stamp(os.fstat(file.fileno()))
            found = measure.of(file)
            after = file_stamps.stamp(os.fstat(file.fileno()))
        lasting = before == after and file_stamps.settled(before, started)
        rows.append(file_stamps.packed_row(name, before if lasting else file_stamps.NO_STAMP, found))
    return file_stamps.as_rows(rows)


@contextlib.contextmanager
def _readable(name: str, what: str, error: type[LogitCacheError]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise error(
            f"{what} '{name}' cannot be read: {cause.strerror or cause}.\n"
            "  Fix: put the file back or make it readable, then run the same command again."
        ) from cause


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def fix_of(cause: OSError) -> str | None:
    """Return what a user can do about an error of the file system; None if nothing is known."""
    return _FIXES.get(cause.errno or 0)


def _why_not_written(path: Path, cause: OSError) -> str:
    fix = fix_of(cause) or "remove the cause"
    return f"'{path}' cannot be written: {cause.strerror or cause}.\n  Fix: {fix}; then run the same command again"


def sync_directory(directory: Path) -> None:
    """Make a rename durable, where the file system can."""
    unsupported = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR)
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as cause:
        if cause.errno not in unsupported:
            raise
