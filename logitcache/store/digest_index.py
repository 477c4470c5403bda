"""Digests that are remembered between runs, by the state of each file when it was hashed, as git's index keeps them.

A digest is used again while size, times and inode of its file are the same. A file that changed less than two seconds
before it was hashed gets no stamp: another change could leave the same one.
"""

import contextlib
import hashlib
import itertools
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError, LogitCacheError
from logitcache.runtime.console import track
from logitcache.store.files import memory_file, view_memory, write_memory_blocks
from logitcache.store.safe_files import open_regular

T = TypeVar("T")

_BLOCK = 256  # files a thread takes at a time: enough to hide the cost of handing them out
_SPAN = 1 << 14  # files that are handed out to threads at a time
_THREADS = min(32, 4 * (os.cpu_count() or 1))  # more than cores: network disks answer late

Stamp = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
StampRows = NDArray[np.void]

NO_STAMP: Stamp = (-1, 0, 0, 0)  # no file has this size, so it is never found again
_ROW = np.dtype(
    [
        ("key", "<u8"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("ctime_ns", "<i8"),
        ("inode", "<u8"),
        ("digest", "u1", (32,)),
    ]
)
_PACKED = struct.Struct("<QqqqQ32s")  # the same bytes
_STAMP_FIELDS = ["size", "mtime_ns", "ctime_ns", "inode"]
_RACY_NS = 2_000_000_000
_MERGED_ROWS = 1 << 16  # rows of an index that are put together at a time
_MOST_ROWS = 8_000_000


def now_ns() -> int:
    """Return the wall clock in nanoseconds."""
    return time.time_ns()


def stamp(status: os.stat_result) -> Stamp:
    """Return what changes when a file is written, replaced or restored from a copy."""
    inode = status.st_ino & (2**64 - 1)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode


_TAG = struct.Struct("<qqQ")


def stamp_of_tag(size: int, tag: str) -> Stamp:
    """Return what stands for the size and the tag of a file in storage; without a tag it is never found again."""
    if not tag:
        return NO_STAMP
    first, second, third = _TAG.unpack(hashlib.blake2b(tag.encode(), digest_size=_TAG.size).digest())
    return size, first, second, third


def settled(stamp: Stamp, moment_ns: int) -> bool:
    """Whether a file was last changed well before a moment."""
    return max(stamp[1], stamp[2]) + _RACY_NS < moment_ns


def state(paths: Iterable[Path], *facts: object) -> bytes | None:
    """Digest some facts and how files and folders look; None if one is missing, or changed just now."""
    moment, found = now_ns(), []
    for path in paths:
        try:
            status = path.lstat()
        except OSError:
            return None
        if not settled(stamp(status), moment):
            return None
        found.append((status.st_dev, *stamp(status)))
    return hashlib.sha256(repr((found, facts)).encode()).digest()


def packed_row(name: str, stamp: Stamp, digest: bytes = bytes(32)) -> bytes:
    """Return the bytes of one row for an absolute path, whose 64-bit key collides only if the stamp is equal, too."""
    key = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return _PACKED.pack(int.from_bytes(key, "little"), *stamp, digest)


def as_rows(packed: Iterable[bytes]) -> StampRows:
    """Return [n] rows, whose fields are the key, the stamp and the digest."""
    rows: StampRows = np.frombuffer(bytearray(b"".join(packed)), _ROW)
    return rows


class StampIndex:
    """Digests by stamp, in order of the key."""

    def __init__(self, stored: bytes | memoryview = b"") -> None:
        """Read an index; bytes of another length than whole rows count as none."""
        sound = len(stored) % _ROW.itemsize == 0
        self._rows: StampRows = np.frombuffer(stored if sound else b"", _ROW)
        self._keys = np.ascontiguousarray(self._rows["key"])
        self._asked = np.zeros(len(self._rows), bool)

    def fill(self, rows: StampRows) -> NDArray[np.bool_]:
        """Fill in the digests of rows whose stamp is known; returns which were."""
        if len(self._rows) == 0:
            return np.zeros(len(rows), bool)
        place = np.minimum(np.searchsorted(self._keys, rows["key"]), len(self._rows) - 1)
        old = self._rows[place]
        known = old["key"] == rows["key"]
        for field in _STAMP_FIELDS:
            known &= old[field] == rows[field]
        rows["digest"][known] = old["digest"][known]
        self._asked[place[known]] = True
        return np.asarray(known, bool)

    def merged(self, rows: StampRows) -> bytes:
        """Return the bytes of an index that holds these rows, those that were found, and the older ones of others."""
        return b"".join(self.merged_blocks(rows))

    def merged_blocks(self, rows: StampRows) -> Iterator[bytes]:
        """Yield the same bytes, some rows at a time."""
        new = np.flatnonzero(rows["size"] >= 0)
        old = self._older(rows)
        order = np.argsort(np.concatenate([self._keys[old], rows["key"][new]]), kind="stable")
        for start in range(0, len(order), _MERGED_ROWS):
            chosen = order[start : start + _MERGED_ROWS]
            is_old = chosen < len(old)
            block = np.empty(len(chosen), _ROW)
            block[is_old] = self._rows[old[chosen[is_old]]]
            block[~is_old] = rows[new[chosen[~is_old] - len(old)]]
            yield block.tobytes()

    def _older(self, rows: StampRows) -> NDArray[np.int64]:
        """Return the places of rows that stay: those of other files, and of too many those that were found."""
        replacing = np.sort(rows["key"])
        place = np.minimum(np.searchsorted(replacing, self._keys), len(replacing) - 1)
        stays = replacing[place] != self._keys if len(replacing) else np.ones(len(self._keys), bool)
        if int(stays.sum()) + len(rows) > _MOST_ROWS:
            stays &= self._asked
        return np.flatnonzero(stays)


class Measure(NamedTuple):
    """A function of a file, of at most 32 bytes; `name` ends the path of its index, `doing` is the progress's verb."""

    name: str
    doing: str
    of: Callable[[BinaryIO], bytes]


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

    `fresh` opens all of them. `what` names one such file ("image", "shard"); raises `error` for the first that cannot
    be read. `paths` may make its items when they are needed, some at a time.
    """
    found = np.empty((len(paths), width), np.uint8)
    if not len(paths):
        return found
    # The first and the last in order share the folders that all of them share.
    ends = min(map(os.path.abspath, paths)), max(map(os.path.abspath, paths))
    store = memory_file(os.path.commonpath([os.path.dirname(name) for name in ends]), measure.name)
    index = StampIndex(view_memory(store) or b"")
    known = np.zeros(len(paths), bool)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(paths), _SPAN):
            span = slice(start, start + _SPAN)
            names = [os.path.abspath(path) for path in paths[span]]
            packed = pool.map(lambda block: _stamp_rows(block, what, error), _pieces(names, _BLOCK))
            rows = as_rows(itertools.chain.from_iterable(packed))
            known[span] = False if fresh else index.fill(rows)
            found[span] = rows["digest"][:, :width]
        todo = np.flatnonzero(~known)
        rows, done = np.empty(len(todo), _ROW), 0
        measured = _measured(pool, paths, todo, lambda block: _measured_rows(block, measure, what, error))
        try:
            for row in track(measured, f"{measure.doing} {what}s", len(todo), unit=f"{what}s"):
                rows[done] = row
                done += 1
        finally:
            # A long first pass that is interrupted is not lost.
            if done:
                write_memory_blocks(store, lambda: index.merged_blocks(rows[:done]))
    found[todo] = rows["digest"][:, :width]
    return found


def _measured(
    pool: ThreadPoolExecutor,
    paths: Sequence[str | Path],
    todo: NDArray[np.int64],
    measure: Callable[[Sequence[str]], StampRows],
) -> Iterator[np.void]:
    """Yield the row of each file in turn."""
    for start in range(0, len(todo), _SPAN):
        names = [os.path.abspath(paths[number]) for number in todo[start : start + _SPAN].tolist()]
        for rows in pool.map(measure, _pieces(names, _BLOCK)):
            yield from rows


SHA256 = Measure("stamps", "hashing", lambda file: hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _stamp_rows(names: Sequence[str], what: str, error: type[LogitCacheError]) -> list[bytes]:
    rows = []
    for name in names:
        with _readable(name, what, error):
            status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise error(f"{what} '{name}' is not a regular file. Remove it and run again.")
        rows.append(packed_row(name, stamp(status)))
    return rows


def _measured_rows(names: Sequence[str], measure: Measure, what: str, error: type[LogitCacheError]) -> StampRows:
    rows = []
    for name in names:
        with _readable(name, what, error), open_regular(name) as file:
            started = now_ns()
            before = stamp(os.fstat(file.fileno()))
            found = measure.of(file)
            after = stamp(os.fstat(file.fileno()))
        lasting = before == after and settled(before, started)
        rows.append(packed_row(name, before if lasting else NO_STAMP, found))
    return as_rows(rows)


@contextlib.contextmanager
def _readable(name: str, what: str, error: type[LogitCacheError]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise error(
            f"{what} '{name}' cannot be read: {cause.strerror or cause}.\n"
            "  Fix: put the file back or make it readable, then run the same command again."
        ) from cause
