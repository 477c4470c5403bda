"""Caches at URLs, and mirrors of them on this machine. The storage is the truth: what is written goes there first."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from logitcache.errors import CacheError, RemoteError
from logitcache.runtime.console import track
from logitcache.store.arrays import COMMITS, RECORD, StoredShard, recorded_bytes
from logitcache.store.base import Store
from logitcache.store.compared_shards import ComparedShards, sound_digest, wrong_digest, wrong_size
from logitcache.store.fetch import fetched
from logitcache.store.file_locks import locked_part
from logitcache.store.files import fix_of
from logitcache.store.mirror_folder import FOLDER, TRIES, USED, Room, is_shard, room
from logitcache.store.prefetch import Ahead
from logitcache.store.remote.client import REQUESTS, Entry, Remote
from logitcache.store.remote.digests import object_digests
from logitcache.store.remote.transfer import too_long
from logitcache.store.safe_files import MAX_METADATA_BYTES, inside, parts_of, read_below, regular_size

URL, LOCK = "url", "lock"
"""Files beside a mirror: where the cache is, and what is locked while the mirror is compared with that."""

_ODD = re.compile(r"[^A-Za-z0-9._-]")

FRESH = 5.0
"""Seconds for which a file that the storage does not have is not looked for again."""

IN_FLIGHT = 256 << 20
"""Bytes of shards that are downloaded at a time, at most."""

T = TypeVar("T")


class Mirror(Store):
    """A cache at a URL, and the folder of this machine in which what was needed of it is read."""

    is_local = False

    def __init__(self, remote: Remote, path: Path, room: Room) -> None:
        self.remote, self._path, self._room = remote, path, room
        self._shards = ComparedShards(path, str(remote))
        self._absent: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        # A fork has neither the threads of its parent nor what they held.
        self._process = os.getpid()
        self._room = Room(self._room.folder, self._room.limit)
        self._ahead = Ahead(self._download_used)

    def __reduce__(self) -> tuple[Any, ...]:
        return mirror_of, (self.remote.url,)

    def __str__(self) -> str:
        return str(self.remote)

    @property
    def path(self) -> Path:
        """The folder of this machine."""
        return self._path

    @property
    def limit(self) -> int:
        """Bytes of shards that the mirrors on this machine may hold."""
        return self._room.limit

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Hold the lock of the mirror, which ends with the process."""
        with _explained(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._path.parent / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def create(self, files: Mapping[str, bytes], root: str) -> None:
        """Write the first files of a cache, the root last; raise CacheError where there is anything else."""
        if not self._created(files, root) and self.remote.read(root) != files[root]:
            raise CacheError(
                f"another run has created {self} meanwhile, with other contents. Fix: run the same command "
                "again, which continues that cache or says how they differ"
            )

    def _created(self, files: Mapping[str, bytes], root: str) -> bool:
        """Write the files unless the root is there."""
        listed = self.remote.list().keys()
        if root in listed:
            return False
        self._require_vacant(listed - files.keys())
        first = [key for key in files if key != root]
        for _ in self.remote.each(lambda key: self.remote.write(key, files[key]), first):
            pass
        try:
            self.remote.write(root, files[root], new=True)
        except FileExistsError:  # made since it was listed
            return False
        return True

    def require_vacant(self) -> None:
        """Raise CacheError where there are objects, and RemoteError where nothing can be."""
        self._require_vacant(self.remote.list().keys())

    def _require_vacant(self, others: Collection[str]) -> None:
        if others:
            raise CacheError(
                f"{self} holds {len(others)} objects that are of no cache, such as {min(others)}: nothing is "
                "overwritten. Fix: name another URL, or remove them"
            )

    def read(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes:
        """Read a file, which is downloaded unless it is here."""
        with contextlib.suppress(FileNotFoundError):
            return read_below(self._path, key, most)
        parts_of(self._path, key)
        if time.monotonic() - self._absent.get(key, -FRESH) < FRESH:
            raise FileNotFoundError(f"{self}/{key}")
        try:
            data = self.stored(key, most)
        except FileNotFoundError:
            self._absent[key] = time.monotonic()
            raise
        self.keep(key, data)
        return data

    def stored(self, key: str, most: int) -> bytes:
        """Read a file of at most `most` bytes from the storage; raises as `read` does."""
        try:
            return self.remote.read(key, most=most)
        except RemoteError as error:
            if too_long(most) not in str(error):
                raise
            raise CacheError(f"{self}/{key} has more than {most} bytes. Fix: restore it") from error

    def exists(self, key: str) -> bool:
        """Whether a file is there; a new one is downloaded."""
        try:
            self.read(key)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file to the storage, then to the mirror; a shard only if it fits there."""
        parts_of(self._path, key)
        self.remote.write(key, data)
        if not is_shard(key):
            self.keep(key, data)
        elif len(data) <= self.limit:
            with self._room.made(len(data)):
                self.keep(key, data)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files from the storage, then from the mirror."""
        keys = list(keys)
        for key in keys:
            parts_of(self._path, key)
        self.remote.remove(keys)
        for key in keys:
            self.drop(key)

    def sizes(self) -> dict[str, int]:
        """List the sizes of all objects; raise RecipeError for a web server."""
        return {key: entry.size for key, entry in self.remote.list().items()}

    def stored_bytes(self) -> int:
        """Add up the sizes of all objects; those of a web server, which lists none, by the commit records."""
        if self.remote.is_listable:
            return sum(self.sizes().values())
        files = [file for file in self._path.rglob("*") if file.is_file()]
        others = [file for file in files if not is_shard(file.relative_to(self._path).as_posix())]
        records = [file for file in others if file.parent.name.endswith(COMMITS) and RECORD.fullmatch(file.name)]
        return sum(file.stat().st_size for file in others) + sum(recorded_bytes(file.read_bytes()) for file in records)

    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare the sizes in a listing; digests of what was read before and has the same tag; `fresh` reads all.

        A web server lists nothing: its shards differ only if they are read.
        """
        found: list[str | None] = [None] * len(parts)
        listed: dict[str, Entry] = {}
        if self.remote.is_listable:
            folders = list(dict.fromkeys(part.array.name for part in parts))
            for entries in self.remote.each(self.remote.list, folders):
                listed |= entries
            sizes = [listed[part.key].size if part.key in listed else None for part in parts]
            found = [wrong_size(part, size, str(self)) for part, size in zip(parts, sizes, strict=True)]
        readable = [part for part, text in zip(parts, found, strict=True) if text is None]
        digests = iter(object_digests(self.remote, readable, listed, fresh=fresh))
        for number, text in enumerate(found):
            digest = next(digests) if text is None else None
            found[number] = text if digest is None else wrong_digest(parts[number], digest, str(self))
        return found

    def ensure(self, parts: Sequence[StoredShard]) -> None:
        """Download shards that are not here, whole and equal to their records; raise CacheError if they differ."""
        if self._process != os.getpid():
            self._begin()
        missing = self._without_sound([part for part in parts if not self._shards.matches(part)])
        at_once = _at_once(missing)
        done = self.remote.each(self._download, missing, at_once)
        for _ in track(done, f"reading {self.remote.name}", len(missing), "shards") if len(missing) > 1 else done:
            pass
        self._use({part.shard.view for part in parts})

    def prefetch(self, parts: Sequence[StoredShard]) -> None:
        """Download shards in threads, if they and as many others fit."""
        if self._process != os.getpid():
            self._begin()
        if 2 * sum(part.size for part in parts) > self.limit:
            return
        self._ahead.ask(part for part in parts if not self._shards.matches(part))

    def open(self, part: StoredShard) -> int:
        """Open the file of a shard, downloaded if it is not here."""
        return self._here(part, self._shards.open)

    def read_shard(self, part: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard, downloaded if it is not here; without `keep` from the storage alone."""
        return self._here(part, self._shards.read) if keep else fetched(self.remote, part)

    def _here(self, part: StoredShard, reading: Callable[[StoredShard], T]) -> T:
        """Read a shard that is here, whatever other processes remove to make room for theirs."""
        for _ in range(TRIES - 1):
            self.ensure([part])
            with contextlib.suppress(FileNotFoundError):
                return reading(part)
        self.ensure([part])
        return reading(part)

    def keep(self, key: str, data: bytes | memoryview) -> None:
        """Let the mirror have a file, which is changed only where it differs: processes hold locks on some."""
        file = inside(self._path, key)
        self._absent.pop(key, None)
        with _explained(file):
            if regular_size(file) == len(data) and file.read_bytes() == data:
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked_part(file) as written:
                written.finish(data)

    def drop(self, key: str) -> None:
        """Let the mirror lack a file that the storage does not have."""
        self._absent[key] = time.monotonic()
        self.forget(key)

    def forget(self, key: str) -> None:
        """Let the mirror lack a file, which is read from the storage when it is needed."""
        file = inside(self._path, key)
        with _explained(file):
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the mirror: the storage has no cache."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _download_used(self, part: StoredShard) -> None:
        self._download(part)
        self._use({part.shard.view})

    def _without_sound(self, parts: list[StoredShard]) -> list[StoredShard]:
        """Leave out what an earlier run has downloaded, and what is still as it was."""
        there = [part for part in parts if regular_size(self._path / part.key) == part.size]
        with contextlib.suppress(CacheError):  # removed by another process meanwhile
            self._shards.wrong(there, fresh=False)
        return [part for part in parts if not self._shards.matches(part)]

    def _download(self, part: StoredShard) -> None:
        """Read a shard from the storage, unless another process does, or has."""
        file = inside(self._path, part.key)
        with contextlib.ExitStack() as held:
            held.enter_context(_explained(file))
            file.parent.mkdir(parents=True, exist_ok=True)
            written = held.enter_context(locked_part(file))
            if regular_size(file) != part.size or not part.is_of(sound_digest(io.BytesIO(file.read_bytes()), part)):
                data = fetched(self.remote, part)
                with self._room.made(len(data)):
                    written.finish(data)
            self._shards.written(part)

    def _use(self, views: set[int]) -> None:
        """Remember that views are in use."""
        with contextlib.suppress(OSError):
            (self._path.parent / USED).mkdir(exist_ok=True)
            for view in views:
                (self._path.parent / USED / str(view)).touch()


def _at_once(parts: Sequence[StoredShard]) -> int:
    largest = max((part.size for part in parts), default=1)
    return max(1, min(REQUESTS, IN_FLIGHT // max(1, largest)))


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn an error of the file system into a CacheError that names the mirror."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"the local copy {file} cannot be written: {error.strerror}. Fix: {fix_of(error) or 'remove the cause'}; "
            f"or a smaller {FOLDER}_SIZE, or {FOLDER}=another folder"
        ) from error


def mirror_of(url: str) -> Mirror:
    """Return the mirror of a cache at a URL; nothing is downloaded yet."""
    remote, here = Remote(url), room()
    name = _ODD.sub("_", remote.name).lstrip(".") or "cache"
    folder = here.folder / f"{name}-{hashlib.sha256(remote.url.encode()).hexdigest()[:16]}"
    path = folder / name
    with _explained(path):
        if not (folder / URL).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / URL).write_text(remote.url)
    return Mirror(remote, path, here)
