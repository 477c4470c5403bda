"""`Mirror`: files at a URL, and a folder of this machine that mirrors them. The storage is written first."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from logitcache.errors import CacheError, RemoteError
from logitcache.runtime.console import track
from logitcache.store.base import Store
from logitcache.store.bounded_folder import BoundedFolder
from logitcache.store.download import Prefetcher, download
from logitcache.store.file_locks import locked, locked_partial
from logitcache.store.local import LocalStore
from logitcache.store.mirrors_folder import SIZE, USED, mirrors_folder, writable
from logitcache.store.remote.client import REQUESTS, Entry, Remote
from logitcache.store.remote.digests import object_digests
from logitcache.store.remote.transfer import too_long
from logitcache.store.safe_files import MAX_METADATA_BYTES, inside, parts_of, regular_size
from logitcache.store.shards import COMMITS, RECORD, StoredShard, is_shard, recorded_bytes

URL, LOCK = "url", "lock"
"""Files beside a mirror: its URL, and one to lock while it is refreshed."""

FRESH_SECONDS = 5.0
"""A file that the storage does not have is not requested again within this time."""

IN_FLIGHT = 256 << 20
"""Most bytes of shards that are downloaded at a time."""

TRIES = 3
"""Downloads of a shard that other processes keep evicting before it is read."""

T = TypeVar("T")


class Mirror(Store):
    """Files at a URL, and the folder in which those that were needed are read."""

    is_local = False
    limit: int

    def __init__(self, remote: Remote, path: Path, folder: BoundedFolder) -> None:
        self.remote, self.path, self.limit, self._folder = remote, path, folder.limit, folder
        self._local = LocalStore(path, str(remote))
        self._absent: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        # A fork has none of the threads of its parent.
        self._process, self._prefetcher = os.getpid(), Prefetcher(self._download)

    def __reduce__(self) -> tuple[Any, ...]:
        return mirror_of, (self.remote.url,)

    def __str__(self) -> str:
        return str(self.remote)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the mirror, which ends with the process."""
        with contextlib.ExitStack() as held:
            with writable(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path.parent / LOCK, os.O_RDWR | os.O_CREAT))
            yield

    @contextlib.contextmanager
    def creating(self, files: Mapping[str, bytes], root: str) -> Iterator[None]:
        """Write the first files to the storage, the root last and only if there is none; then hold the lock."""
        with self.locked():
            listed = self.remote.list().keys()
            if root not in listed:
                self._require_none(listed - files.keys())
                first = [key for key in files if key != root]
                list(self.remote.each(lambda key: self.remote.write(key, files[key]), first))
                with contextlib.suppress(FileExistsError):  # created since it was listed
                    self.remote.write(root, files[root], new=True)
            if self.remote.read(root) != files[root]:
                raise CacheError(
                    f"another run has created {self} meanwhile, with other contents. Fix: run the same command "
                    "again, which continues that cache or names the differences"
                )
            yield

    def require_vacant(self) -> None:
        """Raise CacheError if there are objects, and RemoteError or RecipeError if nothing can be written."""
        self._require_none(self.remote.list().keys())

    def _require_none(self, others: Iterable[str]) -> None:
        if names := sorted(others):
            raise CacheError(
                f"{self} holds {len(names)} objects that are of no cache, such as {names[0]}: nothing is "
                "overwritten. Fix: name another URL, or remove them"
            )

    def read(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes:
        """Read a file, which is downloaded unless it is here."""
        with contextlib.suppress(FileNotFoundError):
            return self._local.read(key, most)
        if time.monotonic() - self._absent.get(key, -FRESH_SECONDS) < FRESH_SECONDS:
            raise FileNotFoundError(f"{self}/{key}")
        try:
            data = self.stored(key, most)
        except FileNotFoundError:
            self._absent[key] = time.monotonic()
            raise
        self.put(key, data)
        return data

    def read_first(self, key: str, size: int) -> bytes:
        """Read the first bytes of a file, from the storage unless it is here."""
        with contextlib.suppress(FileNotFoundError):
            return self._local.read_first(key, size)
        return self.remote.read_range(key, 0, size)

    def stored(self, key: str, most: int) -> bytes:
        """Read a file of at most `most` bytes from the storage; raises as `read` does."""
        try:
            return self.remote.read(key, most=most)
        except RemoteError as error:
            if too_long(most) not in str(error):
                raise
            raise CacheError(f"{self}/{key} has more than {most} bytes. Fix: restore it") from error

    def exists(self, key: str) -> bool:
        """Whether there is a file; a new one is downloaded."""
        try:
            self.read(key)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write a file to the storage, then to the mirror; a shard only if it fits there."""
        parts_of(self.path, key)
        self.remote.write(key, data)
        if not is_shard(key):
            self.put(key, data)
        elif len(data) <= self.limit:
            self.put(key, data, self._folder.reserved(len(data)))

    def rewrite(self, key: str, data: bytes) -> None:
        """Write a small file to the storage, then to the mirror, in place."""
        self.remote.write(key, data)
        self._local.rewrite(key, data)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files from the storage, then from the mirror."""
        keys = list(keys)
        for key in keys:
            parts_of(self.path, key)
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
        files = [file for file in self.path.rglob("*") if file.is_file()]
        others = [file for file in files if not is_shard(file.relative_to(self.path).as_posix())]
        records = [file for file in others if file.parent.name.endswith(COMMITS) and RECORD.fullmatch(file.name)]
        return sum(file.stat().st_size for file in others) + sum(recorded_bytes(file.read_bytes()) for file in records)

    def wrong(self, shards: Sequence[StoredShard], *, fresh: bool) -> list[str | None]:
        """Compare listed sizes, and digests that are remembered by the tags of objects; `fresh` reads all.

        A web server lists nothing: its shards are only compared when they are read.
        """
        found: list[str | None] = [None] * len(shards)
        listed: dict[str, Entry] = {}
        if self.remote.is_listable:
            for entries in self.remote.each(self.remote.list, list(dict.fromkeys(shard.array for shard in shards))):
                listed |= entries
            sizes = [listed[shard.key].size if shard.key in listed else None for shard in shards]
            found = [shard.wrong_size(size, str(self)) for shard, size in zip(shards, sizes, strict=True)]
        sound = [number for number, text in enumerate(found) if text is None]
        digests = object_digests(self.remote, [shards[number] for number in sound], listed, fresh=fresh)
        for number, digest in zip(sound, digests, strict=True):
            found[number] = None if digest is None else shards[number].wrong_digest(digest, str(self))
        for number, shard in enumerate(shards):
            if found[number] is not None and shard.longer is not None:
                with contextlib.suppress(CacheError, RemoteError):
                    download(self.remote, shard)
                    found[number] = None
        return found

    def ensure(self, shards: Sequence[StoredShard], ahead: Sequence[StoredShard] = ()) -> None:
        """Download shards that are not here, several at a time; those `ahead` if they and as many others fit."""
        if self._process != os.getpid():
            self._begin()
        missing = [shard for shard in shards if not self._local.knows(shard)]
        there = [shard for shard in missing if regular_size(self.path / shard.key) == shard.size]
        with contextlib.suppress(CacheError):  # removed by another process meanwhile
            self._local.wrong(there, fresh=False)  # an earlier run may have downloaded them
        missing = [shard for shard in missing if not self._local.knows(shard)]
        at_once = max(1, min(REQUESTS, IN_FLIGHT // max([1, *(shard.size for shard in missing)])))
        done = self.remote.each(self._download, missing, at_once)
        for _ in track(done, f"reading {self.remote.name}", len(missing), "shards") if len(missing) > 1 else done:
            pass
        self._touch(shards)
        if 2 * sum(shard.size for shard in ahead) <= self.limit:
            self._prefetcher.start(shard for shard in ahead if not self._local.knows(shard))

    def open(self, shard: StoredShard) -> int:
        """Open the file of a shard, downloaded if it is not here."""
        return self._here(shard, self._local.open)

    def read_shard(self, shard: StoredShard, *, keep: bool = True) -> bytes:
        """Read a shard, downloaded if it is not here; without `keep` from the storage alone."""
        return self._here(shard, self._local.read_shard) if keep else download(self.remote, shard)

    def _here(self, shard: StoredShard, read: Callable[[StoredShard], T]) -> T:
        """Read a shard from the mirror, in which other processes may evict or change it meanwhile."""
        for _ in range(TRIES - 1):
            self.ensure([shard])
            with contextlib.suppress(FileNotFoundError, CacheError):
                return read(shard)
        self.ensure([shard])
        return read(shard)

    def put(self, key: str, data: bytes | memoryview, room: AbstractContextManager[None] | None = None) -> None:
        """Write a file to the mirror, unless it has these bytes: processes hold locks on some files."""
        file = inside(self.path, key)
        self._absent.pop(key, None)
        with writable(file):
            if regular_size(file) == len(data) and file.read_bytes() == data:
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked_partial(file) as part, room or contextlib.nullcontext():  # in this order, as in `_download`
                part.finish(data)

    def drop(self, key: str) -> None:
        """Remove a file that the storage does not have from the mirror."""
        self._absent[key] = time.monotonic()
        self.forget(key)

    def forget(self, key: str) -> None:
        """Remove a file from the mirror; it is read from the storage when it is needed."""
        file = inside(self.path, key)
        with writable(file):
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the mirror of a storage that has no cache."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _download(self, shard: StoredShard) -> None:
        """Read a shard from the storage, unless another process does, or has."""
        if shard.size > self.limit:
            raise CacheError(
                f"a shard of {shard.size} bytes does not fit into the local copy, of {self.limit} bytes. "
                f"Fix: {SIZE}={shard.size} or more"
            )
        file = inside(self.path, shard.key)
        with writable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked_partial(file) as part:
                here = regular_size(file) == shard.size
                if not here or not shard.matches(shard.sound_digest(io.BytesIO(file.read_bytes()))):
                    data = download(self.remote, shard)
                    with self._folder.reserved(len(data)):
                        part.finish(data)
                self._local.trust(shard)
        self._touch([shard])

    def _touch(self, shards: Sequence[StoredShard]) -> None:
        """Note that the views of shards are in use."""
        with contextlib.suppress(OSError):
            (self.path.parent / USED).mkdir(exist_ok=True)
            for view in {shard.shard.view for shard in shards}:
                (self.path.parent / USED / str(view)).touch()


def mirror_of(url: str) -> Mirror:
    """Return the mirror of a URL; nothing is downloaded yet."""
    remote, folder = Remote(url), mirrors_folder()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", remote.name).lstrip(".") or "cache"
    parent = folder.path / f"{name}-{hashlib.sha256(remote.url.encode()).hexdigest()[:16]}"
    with writable(parent / name):
        if not (parent / URL).is_file():
            parent.mkdir(parents=True, exist_ok=True)
            (parent / URL).write_text(remote.url)
    return Mirror(remote, parent / name, folder)
