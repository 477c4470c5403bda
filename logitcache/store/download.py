"""Downloads of shards, whole and equal to their commit records, also ahead of their use."""

import io
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from logitcache.errors import CacheError, RemoteError
from logitcache.store.remote.client import PART, Remote
from logitcache.store.shards import StoredShard

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
    if shard.longer is not None:
        with suppress(FileNotFoundError, RemoteError):
            if (restored := shard.restored(remote.read(shard.key, most=shard.longer.most))) is not None:
                return restored
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
