"""`LocalStore`: files in a folder of this machine. Shards are compared with their records before they are read."""

import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.digest_index import SHA256, remembered
from logitcache.store.files import explained, write_atomically
from logitcache.store.safe_files import MAX_METADATA_BYTES, inside, open_below, read_below, regular_size, regular_status
from logitcache.store.shards import StoredShard


class LocalStore(Store):
    """Files in a folder, called `name` in messages about shards; it remembers which shards match their records.

    The floats of hot arrays are checked while they are hashed: a remembered digest stands for both.
    """

    is_local = True
    limit = None

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self._name = path, name or str(path)
        self._known: dict[str, int | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.path.absolute(),)

    def __str__(self) -> str:
        return str(self.path)

    def creating(self, files: Mapping[str, bytes], root: str) -> AbstractContextManager[None]:
        """Do nothing: a folder appears by its rename."""
        return nullcontext()

    def require_vacant(self) -> None:
        """Do nothing: `preparing` checks the folder."""

    def read(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes:
        """Read a file."""
        return read_below(self.path, key, most)

    def read_first(self, key: str, size: int) -> bytes:
        """Read the first bytes of a file."""
        with open(open_below(self.path, key), "rb") as file:
            return file.read(min(size, os.fstat(file.fileno()).st_size))  # room for `size` bytes is made at once

    def exists(self, key: str) -> bool:
        """Whether there is a regular file."""
        return regular_size(inside(self.path, key)) is not None

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all."""
        write_atomically(inside(self.path, key), data)

    def rewrite(self, key: str, data: bytes) -> None:
        """Write a small file in place, by one call."""
        path = inside(self.path, key)
        with explained(path), open(path, "r+b", buffering=0) as file:
            file.write(data)
            file.truncate()
            os.fsync(file.fileno())

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for file in (inside(self.path, key) for key in keys):
            with explained(file, "removed", "make its folder writable"):
                file.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """List the sizes of all files, by key."""
        sizes, folders = {}, [""]
        while folders:
            folder = folders.pop()
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    key = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{key}/")
                    else:
                        sizes[key] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def stored_bytes(self) -> int:
        """Add up the sizes of all files."""
        return sum(regular_size(file) or 0 for file in self.path.rglob("*"))

    def wrong(self, shards: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare sizes, and digests; files that have not changed since they were hashed are not read again."""
        before = self._statuses(shards)
        sizes = [status and status.st_size for status in before]
        found = [shard.wrong_size(size, self._name) for shard, size in zip(shards, sizes, strict=True)]
        sound = [number for number, text in enumerate(found) if text is None]
        files = {os.path.abspath(self.path / shards[number].key): shards[number] for number in sound}
        measure = SHA256._replace(of=lambda file: files[file.name].sound_digest(file))
        digests = remembered([*files], measure, what="shard", fresh=fresh, error=CacheError)
        after = self._statuses([shards[number] for number in sound])
        for number, digest, status in zip(sound, digests, after, strict=True):
            found[number] = shards[number].wrong_digest(digest.tobytes(), self._name)
            if found[number] is None and _mark(shards[number], status) == _mark(shards[number], before[number]):
                self._known[shards[number].key] = _mark(shards[number], status)
        for number, shard in enumerate(shards):
            if found[number] is not None and self._restored(shard) is not None:
                found[number] = None
        return found

    def _restored(self, shard: StoredShard) -> bytes | None:
        """Return the recorded bytes of a last shard, in whose place lies a longer one; None if none does."""
        if shard.longer is not None:
            with suppress(FileNotFoundError, CacheError), open(open_below(self.path, shard.key), "rb") as file:
                return shard.restored(file.read(shard.longer.most + 1))
        return None

    def ensure(self, shards: Sequence[StoredShard], ahead: Sequence[StoredShard] = ()) -> None:
        """Do nothing: all files are here."""

    def open(self, shard: StoredShard) -> int:
        """Open the file of a shard; its bytes are hashed unless this very file is known to match."""
        with open(open_below(self.path, shard.key), "rb") as file:
            status = os.fstat(file.fileno())
            text = shard.wrong_size(status.st_size, self._name)
            if text is None and self._known.get(shard.key) != _mark(shard, status):
                text = shard.wrong_digest(shard.sound_digest(file), self._name)
                if text is None and _mark(shard, os.fstat(file.fileno())) == _mark(shard, status):
                    self._known[shard.key] = _mark(shard, status)
            if text is None:
                return _rewound(file)
        if (data := self._restored(shard)) is None:
            raise CacheError(text)
        with tempfile.TemporaryFile() as restored:  # without a name
            restored.write(data)
            restored.flush()
            return _rewound(restored)

    def read_shard(self, shard: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard."""
        with open(open_below(self.path, shard.key), "rb") as file:
            text = shard.wrong_size(os.fstat(file.fileno()).st_size, self._name)
            data = file.read(shard.size) if text is None else b""
        text = text or shard.wrong_digest(shard.sound_digest(io.BytesIO(data)), self._name)
        if text is not None and (restored := self._restored(shard)) is not None:
            return restored
        if text is not None:
            raise CacheError(text)
        return data

    def knows(self, shard: StoredShard) -> bool:
        """Whether the file of a shard is known to match its record."""
        mark = _mark(shard, *self._statuses([shard]))
        return mark is not None and self._known.get(shard.key) == mark

    def trust(self, shard: StoredShard) -> None:
        """Remember that the file of a shard, which was just written, matches its record."""
        self._known[shard.key] = _mark(shard, *self._statuses([shard]))

    def _statuses(self, shards: Sequence[StoredShard]) -> list[os.stat_result | None]:
        """Return the status of each file; None if it is not a regular file, or lies behind a link."""
        reached = {name: self._is_inside(f"{name}/c") for name in {shard.array for shard in shards}}
        return [regular_status(self.path / shard.key) if reached[shard.array] else None for shard in shards]

    def _is_inside(self, key: str) -> bool:
        with suppress(CacheError):
            return bool(inside(self.path, key))
        return False


def _mark(shard: StoredShard, status: os.stat_result | None) -> int | None:
    """Return what changes if another file takes the place of one, or if it or the record changes."""
    if status is None:
        return None
    stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return hash((shard.record, stamp))


def _rewound(file: IO[bytes]) -> int:
    """Return a descriptor of a file, at its start, that stays open."""
    descriptor = os.dup(file.fileno())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
