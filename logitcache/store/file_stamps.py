"""Stamps: what a file looked like when it was hashed, as git's index keeps them.

A digest is used again as long as size, times and inode of its file are the same. A file that
changed less than two seconds before it was hashed gets no stamp: another change could leave the
same one.
"""

import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Stamp = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
Rows = NDArray[np.void]

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
_BLOCK = 1 << 16  # rows of an index that are put together at a time
_MOST_ROWS = 8_000_000


def now_ns() -> int:
    """Return the wall clock in nanoseconds."""
    return time.time_ns()


def key(name: str) -> int:
    """Return 64 bits that stand for an absolute path; a collision would need an equal stamp too."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


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
    """Say whether a file was last changed well before a moment."""
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
    """Return the bytes of one row for an absolute path."""
    return _PACKED.pack(key(name), *stamp, digest)


def no_rows(count: int) -> Rows:
    """Return [n] rows that are still to be filled."""
    return np.empty(count, _ROW)


def as_rows(packed: Iterable[bytes]) -> Rows:
    """Return [n] rows, whose fields are the key, the stamp and the digest."""
    rows: Rows = np.frombuffer(bytearray(b"".join(packed)), _ROW)
    return rows


class StampIndex:
    """Digests by stamp, in order of the key."""

    def __init__(self, stored: bytes | memoryview = b"") -> None:
        """Read an index; bytes of another length than whole rows count as none."""
        sound = len(stored) % _ROW.itemsize == 0
        self._rows: Rows = np.frombuffer(stored if sound else b"", _ROW)
        self._keys = np.ascontiguousarray(self._rows["key"])
        self._asked = np.zeros(len(self._rows), bool)

    def fill(self, rows: Rows) -> NDArray[np.bool_]:
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

    def merged(self, rows: Rows) -> bytes:
        """Return the bytes of an index that holds these rows, those that were found, and the older ones of others."""
        return b"".join(self.merged_blocks(rows))

    def merged_blocks(self, rows: Rows) -> Iterator[bytes]:
        """Yield the same bytes, some rows at a time."""
        new = np.flatnonzero(rows["size"] >= 0)
        old = self._older(rows)
        order = np.argsort(np.concatenate([self._keys[old], rows["key"][new]]), kind="stable")
        for start in range(0, len(order), _BLOCK):
            chosen = order[start : start + _BLOCK]
            is_old = chosen < len(old)
            block = np.empty(len(chosen), _ROW)
            block[is_old] = self._rows[old[chosen[is_old]]]
            block[~is_old] = rows[new[chosen[~is_old] - len(old)]]
            yield block.tobytes()

    def _older(self, rows: Rows) -> NDArray[np.int64]:
        """Return the places of rows that stay: those of other files, and of too many those that were found."""
        replacing = np.sort(rows["key"])
        place = np.minimum(np.searchsorted(replacing, self._keys), len(replacing) - 1)
        stays = replacing[place] != self._keys if len(replacing) else np.ones(len(self._keys), bool)
        if int(stays.sum()) + len(rows) > _MOST_ROWS:
            stays &= self._asked
        return np.flatnonzero(stays)
