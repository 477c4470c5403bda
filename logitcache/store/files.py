"""Files: atomic writes, what to do about errors of the file system, and what is kept between runs."""

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from logitcache.errors import CacheError, LogitCacheError, RecipeError

LEFTOVER = ".logitcache-tmp"
"""Suffix of the names of files that matter only while they are written."""

_LONGEST_STEM = 80  # characters of the final name in a temporary one: a name may hold 255 bytes
_KEPT = b"logitcache kept 1\n"

_FIXES = {
    errno.EACCES: "make it readable and writable for you, or name another path",
    errno.EDQUOT: "free space within your quota, or name a path on another disk",
    errno.EEXIST: "name another path, or remove that file or folder",
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


def write_atomically(path: Path, data: bytes | bytearray | memoryview, sync: bool = True) -> None:
    """Write a file so that readers see the old bytes or the new ones, also after a power cut.

    `sync=False` leaves out the flush to the disk. Raises CacheError when the disk is full or the
    folder may not be written; nothing is left behind then.
    """
    _write_atomically(path, [data], sync)


def _write_atomically(path: Path, blocks: Iterable[bytes | bytearray | memoryview], sync: bool) -> None:
    part = path.with_name(f"{path.name[:_LONGEST_STEM]}.{os.getpid()}-{secrets.token_hex(4)}{LEFTOVER}")
    try:
        try:
            with open(part, "xb") as file:
                file.writelines(blocks)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        if sync:
            sync_directory(path.parent)
    except OSError as cause:
        fix = fix_of(cause) or "remove the cause"
        raise CacheError(
            f"'{path}' cannot be written: {cause.strerror or cause}.\n  Fix: {fix}; then run the same command again"
        ) from cause


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove the partial files of killed writers below a directory, and return their paths.

    The caller must be the only writer there.
    """
    found = [Path(parent, name) for parent, _, names in os.walk(directory) for name in names if name.endswith(LEFTOVER)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def user_cache_directory() -> Path | None:
    """Return the folder for what can be computed again; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the standard says to ignore a relative one
        return Path(named, "logitcache")
    try:
        return Path.home() / ".cache" / "logitcache"
    except RuntimeError:
        return None


def memory_file(name: str, ending: str) -> Path | None:
    """Return the file in which something is kept for a path or a URL; None for a user without a home."""
    directory = user_cache_directory()
    return directory / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{ending}" if directory else None


def write_memory(path: Path | None, payload: bytes) -> None:
    """Remember bytes that can be computed again, beside their own digest, if they can be written."""
    write_memory_blocks(path, lambda: [payload])


def write_memory_blocks(path: Path | None, blocks: Callable[[], Iterable[bytes]]) -> None:
    """Remember bytes that are made block by block, twice: for their digest, which is written first, and once more."""
    if path is None:
        return
    with contextlib.suppress(OSError, LogitCacheError):
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for block in blocks():
            digest.update(block)
        _write_atomically(path, itertools.chain([_KEPT + digest.digest()], blocks()), sync=False)


def read_memory(path: Path | None) -> bytes | None:
    """Read remembered bytes; None if there are none or they are damaged."""
    payload = view_memory(path)
    return None if payload is None else bytes(payload)


def view_memory(path: Path | None) -> memoryview | None:
    """Return the same without a second copy of the bytes."""
    try:
        data = memoryview(path.read_bytes() if path else b"")
    except OSError:
        return None
    head = len(_KEPT) + 32
    payload = data[head:]
    return payload if data[:head] == _KEPT + hashlib.sha256(payload).digest() else None


def fix_of(cause: OSError) -> str | None:
    """Return what a user can do about an error of the file system; None if nothing is known."""
    return _FIXES.get(cause.errno or 0)


def refused_by_system(error: Exception) -> Exception:
    """Return an error of the file system whose fix is known as a RecipeError that names both; any other as it is."""
    fix = fix_of(error) if isinstance(error, OSError) else None
    if not isinstance(error, OSError) or fix is None:
        return error
    return RecipeError(f"{error.filename or 'the file system'}: {error.strerror}\n  Fix: {fix}")


@contextlib.contextmanager
def explained(what: object, doing: str = "written", fix: str = "", more: str = "") -> Iterator[None]:
    """Raise an error of the file system as CacheError, with a fix, by default that of `fix_of`."""
    try:
        yield
    except OSError as error:
        fix = fix or fix_of(error) or "remove the cause"
        raise CacheError(f"{what} cannot be {doing}: {error.strerror}. Fix: {fix}{more}") from error


def sync_directory(directory: Path) -> None:
    """Make a rename durable, if the file system can."""
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
