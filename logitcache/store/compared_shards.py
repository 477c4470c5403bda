"""Files of shards whose bytes are compared with their commit records before anything is read of them.

The floats of hot arrays are looked at while they are hashed: what is remembered of a file holds for both.
"""

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from logitcache.errors import CacheError
from logitcache.store.arrays import NOT_FINITE, StoredShard
from logitcache.store.files import SHA256, remembered
from logitcache.store.safe_files import inside, open_below

_BLOCK = 1 << 20
_UNSOUND = bytes(32)


Stamp = tuple[int, ...]
"""What tells one file from another, and from itself after a change: device, inode, size and times."""


class ComparedShards:
    """Shard files in a folder, and which of them this process knows to match which record."""

    def __init__(self, root: Path, where: str) -> None:
        self._root, self._where = root, where
        self._known: dict[str, int] = {}

    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Return how each shard differs from its record, None if not; digests of unchanged files are remembered."""
        before = self._stamps(parts)
        found = [wrong_size(part, _size(stamp), self._where) for part, stamp in zip(parts, before, strict=True)]
        readable = [number for number, text in enumerate(found) if text is None]
        files = {os.path.abspath(self._root / parts[number].key): parts[number] for number in readable}
        measure = SHA256._replace(of=lambda file: sound_digest(file, files[file.name]))
        digests = remembered([*files], measure, what="shard", fresh=fresh, error=CacheError)
        after = self._stamps([parts[number] for number in readable])
        for number, digest, stamp in zip(readable, digests, after, strict=True):
            found[number] = wrong_digest(parts[number], digest.tobytes(), self._where)
            if found[number] is None and stamp == before[number]:
                self._remember(parts[number], stamp)
        return found

    def matches(self, part: StoredShard) -> bool:
        """Whether the file of a shard is known to match its record."""
        (stamp,) = self._stamps([part])
        return stamp is not None and self._known.get(part.key) == hash((part.record, stamp))

    def open(self, part: StoredShard) -> int:
        """Open a shard's file and return its descriptor; raise CacheError unless its bytes match the record.

        Raises FileNotFoundError. Bytes are hashed unless this very file is known to match.
        """
        descriptor = open_below(self._root, part.key)
        try:
            stamp = stamp_of(os.fstat(descriptor))
            text = wrong_size(part, _size(stamp), self._where)
            if text is None and self._known.get(part.key) != hash((part.record, stamp)):
                with open(descriptor, "rb", closefd=False) as file:
                    text = wrong_digest(part, sound_digest(file, part), self._where)
                os.lseek(descriptor, 0, os.SEEK_SET)
                if text is None and stamp_of(os.fstat(descriptor)) == stamp:
                    self._remember(part, stamp)
            if text is not None:
                raise CacheError(text)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, part: StoredShard) -> bytes:
        """Read a shard; raise CacheError unless these bytes match the record, and FileNotFoundError."""
        with open(open_below(self._root, part.key), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = wrong_size(part, size, self._where)
            data = file.read(part.size) if text is None else b""
        text = text or wrong_digest(part, sound_digest(io.BytesIO(data), part), self._where)
        if text is not None:
            raise CacheError(text)
        return data

    def written(self, part: StoredShard) -> None:
        """Note that a shard was written whose bytes match its record."""
        (stamp,) = self._stamps([part])
        if stamp is not None:
            self._remember(part, stamp)

    def _remember(self, part: StoredShard, stamp: Stamp | None) -> None:
        self._known[part.key] = hash((part.record, stamp))

    def _stamps(self, parts: Sequence[StoredShard]) -> list[Stamp | None]:
        """Return the stamp of each file; None for what is no regular file, or lies behind a link."""
        reached = {name: self._is_reached(name) for name in {part.array.name for part in parts}}
        return [_stamp_at(self._root / part.key) if reached[part.array.name] else None for part in parts]

    def _is_reached(self, folder: str) -> bool:
        try:
            inside(self._root, f"{folder}/c")
        except CacheError:
            return False
        return True


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def wrong_size(part: StoredShard, size: int | None, where: str) -> str | None:
    """Say how the size of a shard's bytes differs from its record; None where it does not."""
    if size == part.size:
        return None
    here = "no regular file" if size is None else f"{size} bytes"
    return f"{part.name}: {here} where its record says {part.size} bytes ({where}/{part.key})"


def wrong_digest(part: StoredShard, digest: bytes, where: str) -> str | None:
    """Say what is wrong with a shard whose bytes have this `sound_digest`; None if nothing is."""
    if part.is_of(digest):
        return None
    found = NOT_FINITE if digest == _UNSOUND else "its bytes differ from its record"
    return f"{part.name}: {found} ({where}/{part.key})"


def sound_digest(file: BinaryIO, part: StoredShard) -> bytes:
    """Return the sha256 of a shard's bytes; of a hot one with NaN or infinity what is the digest of nothing."""
    array, rows = part.array, part.array.rows_of(part.shard)
    left = (rows.stop - rows.start) * array.row_bytes if array.storage == "hot" else 0
    digest, is_sound = hashlib.sha256(), True
    while block := file.read(max(1, _BLOCK // array.row_bytes) * array.row_bytes):
        digest.update(block)
        values = block[: min(left, len(block) // array.row_bytes * array.row_bytes)]
        left -= len(values)
        is_sound = is_sound and array.is_finite(np.frombuffer(values, array.dtype).reshape(-1, *array.row_shape))
    return digest.digest() if is_sound else _UNSOUND


def _size(stamp: Stamp | None) -> int | None:
    return None if stamp is None else stamp[2]


def _stamp_at(path: Path) -> Stamp | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return stamp_of(status) if stat.S_ISREG(status.st_mode) else None
