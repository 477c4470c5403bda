"""Where the bytes of a cache lie: in a folder of this machine, or at a URL that a folder here mirrors.

A store is passed as a value. Keys name its files, with "/" between folders. Whatever is read goes through it: the store
proves that a key stays inside, that a file is a regular one, and that a shard matches its record.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from logitcache.errors import CacheError
from logitcache.store.arrays import StoredShard
from logitcache.store.compared_shards import ComparedShards
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import MAX_METADATA_BYTES, inside, read_below, regular_size


class Store(ABC):
    """Where a cache lies; `str` is what messages call it. It can be pickled: each process opens its location."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder of this machine in which files are read."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether all files are on this machine."""

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """Bytes of shards that may be here at a time; None for all."""

    @abstractmethod
    def creating(self) -> AbstractContextManager[None]:
        """Keep other processes of this machine from looking while the cache appears."""

    @abstractmethod
    def create(self, files: Mapping[str, bytes], root: str) -> None:
        """Write the first files of a cache, `root` last, before they appear in the folder here.

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
        """Whether a file, which is no shard, has these bytes."""
        try:
            return self.read(key, len(data)) == data
        except (FileNotFoundError, CacheError):
            return False

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether a file is there by now, also if another machine wrote it."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file so that readers see the old bytes or the new ones."""

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """List the sizes of all files, by key; others may write them meanwhile."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""

    @abstractmethod
    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Return how the stored bytes of each shard differ from its record; None if they do not.

        Sizes are compared, and digests if they are known without reading; `fresh` reads every byte.
        """

    @abstractmethod
    def ensure(self, parts: Sequence[StoredShard]) -> None:
        """Download shards that are not here; raise CacheError if the storage has others than their records."""

    @abstractmethod
    def prefetch(self, parts: Sequence[StoredShard]) -> None:
        """Begin to download shards while others are in use; errors are raised when they are needed."""

    @abstractmethod
    def open(self, part: StoredShard) -> int:
        """Open the file of a shard, whose bytes match its record, and return its descriptor.

        Raises CacheError if they do not match, and FileNotFoundError.
        """

    @abstractmethod
    def read_shard(self, part: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard, whose bytes are compared with its record in any case; raises as `open` does.

        Without `keep` a shard that is elsewhere is not kept here.
        """


class LocalStore(Store):
    """A cache in a folder of this machine."""

    is_local = True
    limit = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shards = ComparedShards(path, str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self._path.absolute(),)

    def __str__(self) -> str:
        return str(self._path)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    def creating(self) -> AbstractContextManager[None]:
        """Do nothing: a folder appears by its rename."""
        return nullcontext()

    def create(self, files: Mapping[str, bytes], root: str) -> None:
        """Do nothing: the folder is all there is."""

    def require_vacant(self) -> None:
        """Do nothing: `preparing` has looked at the folder."""

    def read(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes:
        """Read a file."""
        return read_below(self._path, key, most)

    def exists(self, key: str) -> bool:
        """Whether a file is there."""
        return regular_size(inside(self._path, key)) is not None

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all."""
        write_atomically(inside(self._path, key), data)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for file in (inside(self._path, key) for key in keys):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(
                    f"{file} cannot be removed: {error.strerror}. Fix: make its folder writable"
                ) from error

    def sizes(self) -> dict[str, int]:
        """List the sizes of all files, by key."""
        found = [file for file in self._path.rglob("*") if file.is_symlink() or not file.is_dir()]
        return {file.relative_to(self._path).as_posix(): file.lstat().st_size for file in found}

    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""
        return sum(regular_size(file) or 0 for file in self._path.rglob("*"))

    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare sizes, and digests of what changed since it was last hashed; links are no files."""
        return self._shards.wrong(parts, fresh=fresh)

    def ensure(self, parts: Sequence[StoredShard]) -> None:
        """Do nothing: all is here."""

    def prefetch(self, parts: Sequence[StoredShard]) -> None:
        """Do nothing: all is here."""

    def open(self, part: StoredShard) -> int:
        """Open the file of a shard."""
        return self._shards.open(part)

    def read_shard(self, part: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard."""
        return self._shards.read(part)
