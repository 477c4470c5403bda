"""Downloads of shards, whole and equal to their commit records, also ahead of their use; digests in storage."""

import hashlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from logitcache.errors import CacheError, RemoteError
from logitcache.runtime.console import track
from logitcache.store.base import StoredShard
from logitcache.store.digest_index import NO_STAMP, StampIndex, as_rows, packed_row, stamp_of_tag
from logitcache.store.files import memory_of, read_memory, write_memory
from logitcache.store.remote.client import PART, Entry, Remote

UNUSUAL_BYTES = 256 << 20
"""From this size on the storage must state the same size as the record before a download: a damaged record may state
anything."""

AHEAD = 4
"""Shards that are downloaded ahead at a time."""


def download(remote: Remote, shard: StoredShard) -> bytes:
    """Read a shard from storage; bytes that differ from its record are read once more.

    Raises CacheError if the storage has other bytes: it is damaged, or another cache has taken its place.
    """
    reason: str | None = None
    for _ in range(2):
        try:
            data = _read(remote, shard)
        except FileNotFoundError:
            reason = f"{shard.name} is not there ({remote}/{shard.key})"
        except RemoteError:
            reason = shard.wrong_size(_size(remote, shard.key), str(remote))
            if reason is None:
                raise
        else:
            reason = shard.wrong_digest(shard.sound_digest(io.BytesIO(data)), str(remote))
            if reason is None:
                return data
    raise CacheError(
        f"{remote} is damaged: {reason}, or it has changed since it was opened.\n"
        f"  Fix: open it again; `logitcache verify {remote} --repair RECIPE` writes just what is damaged again"
    )


def _read(remote: Remote, shard: StoredShard) -> bytes:
    if shard.size > UNUSUAL_BYTES and _size(remote, shard.key) != shard.size:
        raise RemoteError(f"{remote}/{shard.key} has another size")
    if shard.size > PART:
        return remote.read(shard.key, shard.size)
    return remote.read_range(shard.key, 0, shard.size)  # one request, as the size is known


def _size(remote: Remote, key: str) -> int | None:
    with suppress(FileNotFoundError):
        return remote.size(key)
    return None


class Prefetcher:
    """A few threads that download shards while there are any in the queue."""

    def __init__(self, fetch: Callable[[StoredShard], None]) -> None:
        self._fetch = fetch
        self._queue: deque[StoredShard] = deque()
        self._threads: list[threading.Thread] = []

    def start(self, shards: Iterable[StoredShard]) -> None:
        """Download these in place of the shards of earlier calls that are still queued."""
        self._queue = deque(shards)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(len(self._queue), AHEAD) - len(self._threads)):
            # Daemons end with the process, whatever they wait for.
            self._threads.append(threading.Thread(target=self._run, name="logitcache-ahead", daemon=True))
            self._threads[-1].start()

    def _run(self) -> None:
        while True:
            try:
                shard = self._queue.popleft()
            except IndexError:
                return
            with suppress(Exception):  # raised again when the shard is needed
                self._fetch(shard)


def object_digests(
    remote: Remote, shards: Sequence[StoredShard], listed: Mapping[str, Entry], *, fresh: bool
) -> list[bytes | None]:
    """Return the digests of shards in storage that are remembered, None for others; `fresh` reads every byte."""
    memory = memory_of(remote.url, "objects")
    index = StampIndex(read_memory(memory) or b"")
    stamps = [stamp_of_tag(*listed[shard.key]) if shard.key in listed else NO_STAMP for shard in shards]
    rows = as_rows(packed_row(f"{remote}/{shard.key}", stamp) for shard, stamp in zip(shards, stamps, strict=True))
    if not fresh:
        known = index.fill(rows)
        return [digest.tobytes() if here else None for digest, here in zip(rows["digest"], known, strict=True)]
    read = remote.each(lambda shard: _digest(remote, shard), shards)
    digests = list(track(read, f"reading {remote.name}", len(shards), "shards"))
    if shards:
        rows["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        write_memory(memory, index.merged(rows))
    return [*digests]


def _digest(remote: Remote, shard: StoredShard) -> bytes:
    """Hash the bytes of an object, part by part; one that is missing, or shorter than its record, has no bytes."""
    try:
        return shard.sound_digest(io.BufferedReader(_Object(remote, shard), PART))
    except FileNotFoundError:
        pass
    except RemoteError:
        if remote.size(shard.key) == shard.size:
            raise
    return hashlib.sha256().digest()


class _Object(io.RawIOBase):
    """The bytes of a shard's object, read by ranges."""

    def __init__(self, remote: Remote, shard: StoredShard) -> None:
        self._remote, self._shard, self._place = remote, shard, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start, self._place = self._place, min(self._place + len(buffer), self._shard.size)
        buffer[: self._place - start] = self._remote.read_range(self._shard.key, start, self._place)
        return self._place - start
