"""Digests of shards in object storage: read in parts, and remembered by the ETags of the objects."""

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from logitcache.errors import RemoteError
from logitcache.runtime.console import track
from logitcache.store.digest_index import NO_STAMP, StampIndex, as_rows, packed_row, stamp_of_tag
from logitcache.store.files import memory_file, read_memory, write_memory
from logitcache.store.remote.client import PART, Entry, Remote
from logitcache.store.shards import StoredShard


def object_digests(
    remote: Remote, shards: Sequence[StoredShard], listed: Mapping[str, Entry], *, fresh: bool
) -> list[bytes | None]:
    """Return the remembered digests of shards in storage, None for others; `fresh` reads every byte instead."""
    memory = memory_file(remote.url, "objects")
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
    """Hash an object part by part; an object that is missing, or shorter than its record, counts as empty."""
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
