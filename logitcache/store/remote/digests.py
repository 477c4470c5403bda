"""Digests of objects in storage, read in parts and remembered by the tags that the storage gives them."""

import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from logitcache.errors import RemoteError
from logitcache.runtime.console import track
from logitcache.store import file_stamps
from logitcache.store.arrays import StoredShard
from logitcache.store.compared_shards import sound_digest
from logitcache.store.files import keep, kept, memory_of
from logitcache.store.remote.client import PART, Entry, Remote


def object_digests(
    remote: Remote, parts: Sequence[StoredShard], listed: Mapping[str, Entry], *, fresh: bool
) -> list[bytes | None]:
    """Return the sha256 of shards' bytes in storage: what is remembered, None for others; `fresh` reads every byte.

    What is not there has no bytes.
    """
    store = memory_of(remote.url, "objects")
    index = file_stamps.StampIndex(kept(store) or b"")
    rows = file_stamps.as_rows(_row(remote, part.key, listed.get(part.key)) for part in parts)
    if not fresh:
        known = index.fill(rows)
        return [digest.tobytes() if here else None for digest, here in zip(rows["digest"], known, strict=True)]
    read = remote.each(lambda part: _streamed(remote, part), parts)
    digests = list(track(read, f"reading {remote.name}", len(parts), "shards"))
    if parts:
        rows["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        keep(store, index.merged(rows))
    return [*digests]


def _streamed(remote: Remote, part: StoredShard) -> bytes:
    """Hash the bytes of an object, part by part."""
    try:
        return sound_digest(io.BufferedReader(_Object(remote, part), PART), part)
    except FileNotFoundError:
        return _NOTHING
    except RemoteError:
        if remote.size(part.key) == part.size:
            raise
        return _NOTHING  # shorter than its record says


class _Object(io.RawIOBase):
    """The bytes of a shard's object, read by ranges."""

    def __init__(self, remote: Remote, part: StoredShard) -> None:
        self._remote, self._part, self._place = remote, part, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start, self._place = self._place, min(self._place + len(buffer), self._part.size)
        buffer[: self._place - start] = self._remote.read_range(self._part.key, start, self._place)
        return self._place - start


_NOTHING = hashlib.sha256().digest()


def _row(remote: Remote, key: str, entry: Entry | None) -> bytes:
    """Return an object's row of the index: its tag stands where files have their times."""
    stamp = file_stamps.NO_STAMP if entry is None else file_stamps.stamp_of_tag(*entry)
    return file_stamps.packed_row(f"{remote}/{key}", stamp)
