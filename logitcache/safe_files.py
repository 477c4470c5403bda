"""Files that others may have made: names that stay inside a folder, and reads that neither wait nor fill the memory."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logitcache.errors import CacheError

MAX_METADATA_BYTES = 16 << 20
"""Largest JSON document that is read."""

MAX_CONTAINERS = 200_000
"""Most lists and objects in a JSON document: each takes many times the memory of its text."""

_BLOCK = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_WAIT = _OPEN | os.O_NONBLOCK | os.O_NOCTTY
_NO_LINK = "no link in a cache is followed. Fix: copy the cache with the files themselves (cp -rL)"


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


def open_regular(root: Path, key: str) -> int:
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
        raise _refusal(root / key, error) from error
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise CacheError(f"{root / key} is no regular file, and {_NO_LINK}")
    return found


def read_regular(root: Path, key: str, most: int) -> bytes:
    """Read a regular file of at most `most` bytes below a folder; raises as `open_regular` does."""
    descriptor = open_regular(root, key)
    try:
        return _read(descriptor, root / key, most)
    finally:
        os.close(descriptor)


def read_folder(root: Path, folder: str, most: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and bytes of each small file in a folder below `root`: at most `most` + 1 bytes, None if unreadable.

    Links are not followed, and nothing waits for a pipe. Yields nothing if there is no such folder; raises CacheError
    for one that is a link.
    """
    at = open_folder(root, folder)
    if at is None:
        return
    try:
        for name in os.listdir(at):
            data = None
            try:
                descriptor = os.open(name, _NO_WAIT, dir_fd=at)
                try:
                    data = os.read(descriptor, most + 1)
                finally:
                    os.close(descriptor)
            except OSError:
                pass
            yield name, data
    finally:
        os.close(at)


def open_folder(root: Path, folder: str) -> int | None:
    """Open a folder below another; None if there is none. Raises CacheError for one that is a link."""
    try:
        return os.open(inside(root, folder), _OPEN | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal(root / folder, error) from error


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


def _refusal(path: Path, error: OSError) -> Exception:
    """Return what to raise if a file cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return error
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EMLINK):
        return CacheError(f"{path} is no regular file, and {_NO_LINK}")
    return CacheError(f"{path} cannot be read: {error.strerror}. Fix: make it readable")
