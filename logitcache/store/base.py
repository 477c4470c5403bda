"""`Store`: where the bytes of a cache lie, and shards as a store sees them: a key, and the record of their bytes.

A store is passed as a value; it knows files and shards, not caches.

Keys name the files, with "/" between folders. Every read goes through the store, which proves that a key stays inside,
that a file is a regular one, and that a shard matches its record.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from logitcache.errors import CacheError
from logitcache.store.safe_files import MAX_METADATA_BYTES

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


class StoredShard(NamedTuple):
    """One array's bytes of one shard, and the record that commits them.

    The first `float_bytes`, which are whole rows of `row_bytes`, must pass `is_finite`.
    """

    key: str
    shard: Shard
    record: bytes
    row_bytes: int
    float_bytes: int
    is_finite: Callable[[bytes], bool]

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


class Store(ABC):
    """A place for files; `str` is its name in messages. It can be pickled: each process opens its location."""

    path: Path
    """The folder of this machine in which files are read."""

    is_local: bool
    """Whether all files are on this machine."""

    limit: int | None
    """Most bytes of shards that are here at a time; None for all."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def creating(self, files: Mapping[str, bytes], root: str) -> AbstractContextManager[None]:
        """Write the first files of a cache elsewhere, `root` last; within the context they appear in the folder here.

        Raises CacheError if something else is there.
        """

    @abstractmethod
    def require_vacant(self) -> None:
        """Raise CacheError if a new cache would find other files in its place."""

    @abstractmethod
    def read(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes:
        """Read a file that is no shard, of at most `most` bytes.

        Raises FileNotFoundError, and CacheError for a larger file and for anything but a regular one.
        """

    def holds(self, key: str, data: bytes) -> bool:
        """Whether a file that is no shard has these bytes."""
        try:
            return self.read(key, len(data)) == data
        except (FileNotFoundError, CacheError):
            return False

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is a file now, also if another machine wrote it."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file so that readers see the old bytes or the new ones."""

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; missing ones are no error."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """List the sizes of all files, by key; others may write them meanwhile."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""

    @abstractmethod
    def wrong(self, shards: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Return how the stored bytes of each shard differ from its record; None if they do not.

        Sizes are compared, and digests if they are known without reading; `fresh` reads every byte.
        """

    @abstractmethod
    def ensure(self, shards: Sequence[StoredShard], ahead: Sequence[StoredShard] = ()) -> None:
        """Download shards that are not here; raise CacheError if the storage has other bytes than their records.

        Then begin to download those `ahead`, in threads and if there is room; their errors are raised when they are
        needed.
        """

    @abstractmethod
    def open(self, shard: StoredShard) -> int:
        """Open the file of a shard, whose bytes match its record, and return its descriptor.

        Raises CacheError if they do not match, and FileNotFoundError.
        """

    @abstractmethod
    def read_shard(self, shard: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard, whose bytes are always compared with its record; raises as `open` does.

        Without `keep` a downloaded shard is not kept here.
        """
