"""Caches at URLs, and copies of them on this machine. The storage is the truth: what is written goes there first."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from logitcache.cache.ahead import Ahead
from logitcache.cache.arrays import COMMITS, RECORD, StoredShard, recorded_bytes
from logitcache.cache.fetch import fetched
from logitcache.cache.objects import object_digests
from logitcache.cache.parts import locked_part
from logitcache.cache.place import Folder, Place, wrong_digest, wrong_size
from logitcache.cache.room import FOLDER, USED, Room, copies_folder, is_shard, room
from logitcache.console import track
from logitcache.errors import CacheError
from logitcache.files import file_digests, regular_size
from logitcache.remote import REQUESTS, Entry, Remote

URL, LOCK = "url", "lock"
"""Files beside a copy: where the cache is, and what is locked while it is compared with that."""

_ODD = re.compile(r"[^A-Za-z0-9._-]")

FRESH = 5.0
"""Seconds for which what the storage does not have is not asked for again."""

IN_FLIGHT = 256 << 20
"""Bytes of shards that are brought at a time, at most."""


class Copy(Place):
    """A cache at a URL, and the folder of this machine in which what was needed of it is read."""

    is_here = False

    def __init__(self, remote: Remote, path: Path, room: Room) -> None:
        self.remote, self.path, self._room = remote, path, room
        self._sound: dict[str, bytes] = {}
        self._absent: dict[str, float] = {}
        self._ahead = Ahead(self._bring_used)

    def __str__(self) -> str:
        return str(self.remote)

    @property
    def limit(self) -> int:
        """Bytes of shards that the copies on this machine may hold."""
        return self._room.limit

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Hold the lock of the copy, which ends with the process."""
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.parent / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
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

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file to the storage, then to the copy, where a shard may find room."""
        self.remote.write(key, data)
        if not is_shard(key):
            self.keep(key, data)
        elif len(data) <= self.limit:
            with self._room.made(len(data)):
                self.keep(key, data)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files from the storage, then from the copy."""
        keys = list(keys)
        self.remote.remove(keys)
        for key in keys:
            self.drop(key)

    def has(self, key: str) -> bool:
        """Whether a file is there; one that is new is brought."""
        if (self.path / key).exists():
            return True
        if time.monotonic() - self._absent.get(key, -FRESH) < FRESH:
            return False
        try:
            self.keep(key, self.remote.read(key))
        except FileNotFoundError:
            self._absent[key] = time.monotonic()
            return False
        return True

    def files(self) -> dict[str, int]:
        """List the sizes of all objects; raise RecipeError for a web server."""
        return {key: entry.size for key, entry in self.remote.list().items()}

    def stored_bytes(self) -> int:
        """Add up the sizes of all objects; a web server lists none, and the commit records tell."""
        if self.remote.is_listable:
            return sum(self.files().values())
        files = [file for file in self.path.rglob("*") if file.is_file()]
        others = [file for file in files if not is_shard(file.relative_to(self.path).as_posix())]
        records = [file for file in others if file.parent.name.endswith(COMMITS) and RECORD.fullmatch(file.name)]
        return sum(file.stat().st_size for file in others) + sum(recorded_bytes(file.read_bytes()) for file in records)

    def wrong(self, parts: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare the sizes in a listing; digests of what was read before and has the same tag; `fresh` reads all.

        A web server lists nothing: then only reading tells.
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

    def bring(self, parts: Sequence[StoredShard]) -> None:
        """Let the copy have shards, whole and equal to their records; raise CacheError where the storage has others."""
        missing = [part for part in parts if not self._is_sound(part)]
        missing = self._without_sound(missing)
        at_once = _at_once(missing)
        brought = self.remote.each(self._bring, missing, at_once)
        for _ in track(brought, f"reading {self.remote.name}", len(missing), "shards") if len(missing) > 1 else brought:
            pass
        self._use({part.shard.view for part in parts})

    def ahead(self, parts: Sequence[StoredShard]) -> None:
        """Bring shards in threads, where they and as many others fit."""
        if 2 * sum(part.size for part in parts) > self.limit:
            return
        self._ahead.ask(part for part in parts if not self._is_sound(part))

    def keep(self, key: str, data: bytes | memoryview) -> None:
        """Let the copy have a file, which is changed only where it differs: processes hold locks on some."""
        file = self.path / key
        with _explained(file):
            if regular_size(file) == len(data) and file.read_bytes() == data:
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked_part(file) as written:
                written.finish(data)

    def drop(self, key: str) -> None:
        """Let the copy lack a file."""
        with _explained(self.path / key):
            (self.path / key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the copy: the storage has no cache."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._sound.clear()

    def _bring_used(self, part: StoredShard) -> None:
        self._bring(part)
        self._use({part.shard.view})

    def _is_sound(self, part: StoredShard) -> bool:
        return self._sound.get(part.key) == part.record and regular_size(self.path / part.key) == part.size

    def _without_sound(self, parts: list[StoredShard]) -> list[StoredShard]:
        """Leave out what an earlier run has brought, and what is still as it was."""
        there = [part for part in parts if regular_size(self.path / part.key) == part.size]
        with contextlib.suppress(CacheError):  # removed by another process meanwhile
            digests = file_digests([self.path / part.key for part in there], what="shard", error=CacheError)
            for part, digest in zip(there, digests, strict=True):
                if part.is_of(digest):
                    self._sound[part.key] = part.record
        return [part for part in parts if not self._is_sound(part)]

    def _bring(self, part: StoredShard) -> None:
        """Read a shard from the storage, unless another process does, or has."""
        file = self.path / part.key
        with contextlib.ExitStack() as held:
            held.enter_context(_explained(file))
            file.parent.mkdir(parents=True, exist_ok=True)
            written = held.enter_context(locked_part(file))
            if regular_size(file) != part.size or not part.is_of(hashlib.sha256(file.read_bytes()).digest()):
                part, data = fetched(self.remote, part, self._renewed)
                with self._room.made(len(data)):
                    written.finish(data)
        self._sound[part.key] = part.record

    def _renewed(self, part: StoredShard) -> StoredShard:
        """Read the record of a shard again, and keep it."""
        key = part.array.record_file(part.shard)
        data = self.remote.read(key)
        self.keep(key, data)
        return part._replace(record=part.array.record_in(data))

    def _use(self, views: set[int]) -> None:
        """Remember that views are in use."""
        with contextlib.suppress(OSError):
            (self.path.parent / USED).mkdir(exist_ok=True)
            for view in views:
                (self.path.parent / USED / str(view)).touch()


def _at_once(parts: Sequence[StoredShard]) -> int:
    largest = max((part.size for part in parts), default=1)
    return max(1, min(REQUESTS, IN_FLIGHT // max(1, largest)))


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what the file system says of a copy into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"the local copy {file} cannot be written: {error.strerror}. Fix: free space there, a smaller "
            f"{FOLDER}_SIZE, or {FOLDER}=another folder"
        ) from error


_copies: dict[tuple[int, Path], Copy] = {}
"""By process: a fork has neither the threads nor the locks of its parent."""


def copy_of(url: str) -> Copy:
    """Return the cache at a URL with its copy here, one for each process."""
    remote, here = Remote(url), room()
    name = _ODD.sub("_", remote.name).lstrip(".") or "cache"
    folder = here.folder / f"{name}-{hashlib.sha256(remote.url.encode()).hexdigest()[:16]}"
    path = folder / name
    with _explained(path):
        if not (folder / URL).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / URL).write_text(remote.url)
    return _copies.setdefault((os.getpid(), path), Copy(remote, path, here))


def place_of(root: Path) -> Place:
    """Return the place of a cache whose files are read in a folder."""
    if root.parent.parent != copies_folder():
        return Folder(root)
    known = _copies.get((os.getpid(), root))
    return copy_of((root.parent / URL).read_text()) if known is None else known
