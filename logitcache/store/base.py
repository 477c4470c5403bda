"""`Store`: where the bytes of a cache lie. A store is passed as a value; it knows files and shards, not caches.

Keys name the files, with "/" between folders. Every read goes through the store, which proves that a key stays inside,
that a file is a regular one, and that a shard matches its record.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from logitcache.errors import CacheError
from logitcache.store.safe_files import MAX_METADATA_BYTES
from logitcache.store.shards import StoredShard


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

    @abstractmethod
    def read_first(self, key: str, size: int) -> bytes:
        """Read the first `size` bytes of a file that is no shard; raises as `read` does."""

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
    def rewrite(self, key: str, data: bytes) -> None:
        """Write a small file on which processes hold locks: here it stays the same file."""

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
