"""Shards as a store sees them: the key of a shard's bytes, and the commit record that these bytes must match."""

import hashlib
import io
import re
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

SIZE_BYTES, RECORD_BYTES = 8, 40
"""A commit record: the stored size of a shard's bytes (uint64, little endian), then their seal."""

SHARD_NAME = re.compile(r"c\.(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})(\.0)*")
"""File name of a shard: its view, then its number."""

RECORD = re.compile(r"c\.(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})\.0\.0")
"""File name of a commit record, as `record_name` returns it."""

COMMITS = ".commits"
"""Suffix of the names of arrays of commit records."""

NOT_FINITE = "it holds NaN or infinity"
"""Reported of a shard that no precompute writes."""

_BLOCK = 1 << 20
_UNSOUND = bytes(32)


def seal(digest: bytes, key: str) -> bytes:
    """Return the sha256 of a shard's own sha256 and its key: moved elsewhere, even with its record, it does not fit."""
    return hashlib.sha256(digest + key.encode()).digest()


def recorded_bytes(records: bytes) -> int:
    """Add up the stored sizes in commit records."""
    starts = range(0, len(records), RECORD_BYTES)
    return sum(int.from_bytes(records[start : start + SIZE_BYTES], "little") for start in starts)


def record_name(view: int, number: int) -> str:
    """Return the file name of the commit records of a view's shard."""
    return f"c.{view}.{number}.0.0"


def is_shard(key: str) -> bool:
    """Whether a key is that of a shard, which a mirror may evict at any time."""
    folder, _, name = key.rpartition("/")
    return SHARD_NAME.fullmatch(name) is not None and "/" not in folder and not folder.endswith(COMMITS)


class Shard(NamedTuple):
    """The unit of work, of writing, of committing and of resuming: rows start..stop of a view."""

    view: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"view {self.view} rows {self.start}..{self.stop}"


class Longer(NamedTuple):
    """How the bytes of the last shard of a view are made of those of the longer one that takes its place.

    `shorten` returns None unless images were appended to the cache; the longer shard has at most `most` bytes.
    """

    most: int
    shorten: Callable[[bytes], bytes | None]


class StoredShard(NamedTuple):
    """One array's bytes of one shard, and the record that commits them.

    The first `float_bytes`, which are whole rows of `row_bytes`, must pass `is_finite`. A `longer` one may take the
    place of the last shard of a view.
    """

    key: str
    shard: Shard
    record: bytes
    row_bytes: int
    float_bytes: int
    is_finite: Callable[[bytes], bool]
    longer: Longer | None = None

    @property
    def size(self) -> int:
        """Stored bytes according to the record."""
        return int.from_bytes(self.record[:SIZE_BYTES], "little")

    @property
    def array(self) -> str:
        """Name of the array."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.array} {self.shard}"

    def sound_digest(self, file: BinaryIO) -> bytes:
        """Return the sha256 of the bytes in a file, or zeros if they hold NaN or infinity."""
        digest, left, is_sound = hashlib.sha256(), self.float_bytes, True
        while block := file.read(max(1, _BLOCK // self.row_bytes) * self.row_bytes):
            digest.update(block)
            rows = block[: min(left, len(block) // self.row_bytes * self.row_bytes)]
            left -= len(rows)
            is_sound = is_sound and self.is_finite(rows)
        return digest.digest() if is_sound else _UNSOUND

    def matches(self, digest: bytes) -> bool:
        """Whether the record commits bytes with this `sound_digest`."""
        return seal(digest, self.key) == self.record[SIZE_BYTES:]

    def restored(self, found: bytes) -> bytes | None:
        """Return the recorded bytes, made of those of the longer shard in their place; None if these are others."""
        data = None if self.longer is None or len(found) > self.longer.most else self.longer.shorten(found)
        if data is None or self.wrong_size(len(data), "") or not self.matches(self.sound_digest(io.BytesIO(data))):
            return None
        return data

    def wrong_size(self, size: int | None, where: str) -> str | None:
        """Return how a size differs from the record, None if it does not; `size` is None for no regular file."""
        if size == self.size:
            return None
        here = "no regular file" if size is None else f"{size} bytes"
        return f"{self.name}: {here}, its record states {self.size} bytes ({where}/{self.key})"

    def wrong_digest(self, digest: bytes, where: str) -> str | None:
        """Return what is wrong with bytes of this `sound_digest`; None if nothing is."""
        if self.matches(digest):
            return None
        found = NOT_FINITE if digest == _UNSOUND else "its bytes differ from its record"
        return f"{self.name}: {found} ({where}/{self.key})"
