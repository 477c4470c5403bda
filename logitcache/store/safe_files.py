"""Files that others may have made: names that stay inside a folder, and reads that neither wait nor fill the memory.

Keys name files below a folder, as those of a cache do: no link is followed, and what is refused is a CacheError. Paths
are named by users, or by files of theirs; what is refused is a RefusedError, and missing files are an OSError.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from logitcache.errors import CacheError, RefusedError

MAX_METADATA_BYTES = 16 << 20
"""Largest JSON document that is read."""

MAX_CONTAINERS = 200_000
"""Most lists and objects in a JSON document: each takes many times the memory of its text."""

_BLOCK = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_WAIT = _OPEN | os.O_NONBLOCK | os.O_NOCTTY
_NO_LINK = "no link in a cache is followed. Fix: copy the cache with the files themselves (cp -rL)"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, also behind links. Raises RefusedError for a device, a FIFO or a socket, without waiting."""
    require_regular(path, os.stat(path))  # opening a device may already do something
    return _opened(path, os.O_NONBLOCK)


def require_regular(path: str | Path, status: os.stat_result) -> None:
    """Raise RefusedError unless a path leads to a regular file; a folder is left to `open`, which names it."""
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise RefusedError(
            f"'{path}' is a FIFO, a device or a socket, not a regular file: reading it might never end.\n"
            "  Fix: name a regular file, or remove it."
        )


def require_bounded(path: Path, limit: int) -> int:
    """Return the size of a regular file of at most `limit` bytes.

    Raises OSError for a missing one, RefusedError with the reason alone for a larger one and for anything else.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise RefusedError("it is a symbolic link, and none is followed here: copy the files themselves (cp -rL)")
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError("it is not a regular file")
    if status.st_size > limit:
        raise RefusedError(f"it has {status.st_size} bytes, at most {limit} are read")
    return status.st_size


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; raises as `require_bounded` does."""
    require_bounded(path, limit)
    with _opened(path, os.O_NONBLOCK | os.O_NOFOLLOW) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise RefusedError(f"it grows while it is read, at most {limit} bytes are")
    return data


def regular_status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else, links included."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def regular_size(path: Path) -> int | None:
    """Return the size of a regular file; None for anything else, links included."""
    status = regular_status(path)
    return None if status is None else status.st_size


def _opened(path: str | Path, more: int) -> BinaryIO:
    """Open a file without waiting for it; raise RefusedError if it is no regular one by now."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | more))  # noqa: SIM115  # the caller closes it
    try:
        require_regular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def parts_of(root: Path, key: str) -> list[str]:
    """Split a key at "/"; raise CacheError unless it names a file below `root`, whatever the file system does."""
    parts = key.split("/")
    if all(part not in ("", ".", "..") and "\\" not in part and part.isprintable() for part in parts):
        return parts
    raise CacheError(f"{key!a} names no file inside {root}. Fix: remove the object of that name")


def inside(root: Path, key: str) -> Path:
    """Join a key to a folder; raise CacheError if the file would lie outside, or behind a symbolic link."""
    parts = parts_of(root, key)
    folder = root
    for part in parts[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise CacheError(f"{folder} is a symbolic link, and {_NO_LINK}")
    return root.joinpath(*parts)


def open_below(root: Path, key: str) -> int:
    """Open a regular file below a folder for reading; returns its descriptor and never waits.

    Raises FileNotFoundError, or CacheError for links (also in the folders on the way), pipes, devices and folders.
    """
    parts = parts_of(root, key)
    try:
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts[:-1]:
            try:
                below = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=at)
            finally:
                os.close(at)
            at = below
        try:
            found = os.open(parts[-1], _NO_WAIT, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise _refusal(root, key, error) from error
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise CacheError(f"{root / key} is no regular file, and {_NO_LINK}")
    return found


def read_below(root: Path, key: str, most: int) -> bytes:
    """Read a regular file of at most `most` bytes below a folder; raises as `open_below` does."""
    with open(open_below(root, key), "rb") as file:
        return _read(file.fileno(), root / key, most)


def read_folder(
    root: Path, folder: str, number_of: Callable[[str], int | None], most: int
) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of small files in a folder below `root`: at most `most` + 1 bytes, none if unreadable.

    `number_of` returns the number that a name stands for; None for a file that is not read.
    Links are not followed, and nothing waits for a pipe. Yields nothing if there is no such folder; raises CacheError
    for one that is a link.
    """
    at = open_folder(root, folder)
    if at is None:
        return
    try:
        for name in os.listdir(at):
            number, data = number_of(name), b""
            if number is None:
                continue
            try:
                descriptor = os.open(name, _NO_WAIT, dir_fd=at)
                try:
                    data = os.read(descriptor, most + 1)
                finally:
                    os.close(descriptor)
            except OSError:
                pass
            yield number, data
    finally:
        os.close(at)


def open_folder(root: Path, folder: str) -> int | None:
    """Open a folder below another; None if there is none. Raises CacheError for one that is a link."""
    try:
        return os.open(inside(root, folder), _OPEN | os.O_DIRECTORY)
    except OSError as error:
        refusal = _refusal(root, folder, error)
        if isinstance(refusal, FileNotFoundError):
            return None
        raise refusal from error


def parse_json(data: bytes) -> Any:
    """Parse a JSON document of bounded memory; raise ValueError for what is none, or has too many parts."""
    if len(data) > MAX_METADATA_BYTES or data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError("it has too many parts")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _read(descriptor: int, path: Path, most: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > most:
        raise CacheError(f"{path} has {size} bytes, {most} at most are expected. Fix: restore it")
    blocks, left = [], most + 1
    while left and (block := os.read(descriptor, min(left, max(size + 1, _BLOCK)))):
        blocks.append(block)
        left -= len(block)
    if not left:
        raise CacheError(f"{path} grows while it is read. Fix: restore it")
    return b"".join(blocks)


def _refusal(root: Path, key: str, error: OSError) -> Exception:
    """Return what to raise if a file below a folder cannot be opened; it does not exist if `root` is no folder."""
    path = root / key
    if isinstance(error, FileNotFoundError):
        return error
    if isinstance(error, NotADirectoryError) and not root.is_dir():
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EMLINK):
        return CacheError(f"{path} is no regular file, and {_NO_LINK}")
    return CacheError(f"{path} cannot be read: {error.strerror}. Fix: make it readable")
