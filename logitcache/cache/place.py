"""Where the files of a cache lie: in its own folder, or in storage at a URL, of which a folder here has a copy.

Files are read here, from a folder. Whoever changes a cache, or needs the bytes of shards, asks its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from logitcache.cache.arrays import StoredShard
from logitcache.errors import CacheError
from logitcache.files import file_digests, regular_size, write_atomically


class Place(ABC):
    """Where a cache lies; `str` is what messages call it. Keys name its files, with "/" between folders."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    @abstractmethod
    def is_here(self) -> bool:
        """Whether all of its files are on this machine."""

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """Bytes of shards that may be here at a time; None for all."""

    @abstractmethod
    def creating(self) -> AbstractContextManager[None]:
        """Keep other processes of this machine from looking while the cache appears."""

    @abstractmethod
    def create(self, files: Mapping[str, bytes], root: str) -> None:
        """Make the first files of a cache, `root` last, that the folder here is to have too.

        Raises CacheError where something else is there.
        """

    @abstractmethod
    def require_vacant(self) -> None:
        """Raise CacheError where a new cache would find other files in its place."""

    @abstractmethod
    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file so that readers see the old bytes or the new ones."""

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether a file is there by now, also where another machine wrote it."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """List the sizes of all files, by key; others may write them meanwhile."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""

    @abstractmethod
    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Say what is wrong with the stored bytes of shards; None where nothing is.

        Sizes are compared, and digests as far as they are known without reading; `fresh` reads every byte.
        """

    @abstractmethod
    def bring(self, parts: Sequence[StoredShard]) -> None:
        """Let the folder here have shards; those that come from elsewhere are compared with their records."""

    @abstractmethod
    def ahead(self, parts: Sequence[StoredShard]) -> None:
        """Begin to bring shards while others are in use; what goes wrong is told when they are needed."""


class Folder(Place):
    """A cache in a folder of this machine."""

    is_here = True
    limit = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def creating(self) -> AbstractContextManager[None]:
        """Do nothing: a folder appears by its rename."""
        return nullcontext()

    def create(self, files: Mapping[str, bytes], root: str) -> None:
        """Do nothing: the folder is all there is."""

    def require_vacant(self) -> None:
        """Do nothing: whoever looks for the folder has seen to that."""

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all."""
        write_atomically(self._path / key, data)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for file in (self._path / key for key in keys):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(
                    f"{file} cannot be removed: {error.strerror}. Fix: make its folder writable"
                ) from error

    def has(self, key: str) -> bool:
        """Whether a file is there."""
        return (self._path / key).exists()

    def files(self) -> dict[str, int]:
        """List the sizes of all files, by key."""
        found = [file for file in self._path.rglob("*") if file.is_symlink() or not file.is_dir()]
        return {file.relative_to(self._path).as_posix(): file.lstat().st_size for file in found}

    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""
        return sum(regular_size(file) or 0 for file in self._path.rglob("*"))

    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare sizes, and digests of what changed since it was last hashed; links are no files."""
        found = [wrong_size(part, regular_size(self._path / part.key), str(self)) for part in parts]
        readable = [part for part, text in zip(parts, found, strict=True) if text is None]
        files = [self._path / part.key for part in readable]
        digests = iter(file_digests(files, what="shard", fresh=fresh, error=CacheError))
        return [
            wrong_digest(part, next(digests), str(self)) if text is None else text
            for part, text in zip(parts, found, strict=True)
        ]

    def bring(self, parts: Sequence[StoredShard]) -> None:
        """Do nothing: all is here."""

    def ahead(self, parts: Sequence[StoredShard]) -> None:
        """Do nothing: all is here."""


def wrong_size(part: StoredShard, size: int | None, where: str) -> str | None:
    """Say how the size of a shard's bytes differs from its record; None where it does not."""
    if size == part.size:
        return None
    here = "no regular file" if size is None else f"{size} bytes"
    return f"{part.name}: {here} where its record says {part.size} bytes ({where}/{part.key})"


def wrong_digest(part: StoredShard, digest: bytes, where: str) -> str | None:
    """Say that a shard's bytes, of this sha256, differ from its record; None where they do not."""
    return None if part.is_of(digest) else f"{part.name}: its bytes differ from its record ({where}/{part.key})"
