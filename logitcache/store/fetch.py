"""Read a shard from storage: whole, and as its commit record says."""

import io

from logitcache.errors import CacheError, RemoteError
from logitcache.store.arrays import StoredShard
from logitcache.store.compared_shards import sound_digest, wrong_digest, wrong_size
from logitcache.store.remote.client import PART, Remote

UNUSUAL = 256 << 20
"""Bytes from which on a record is not believed before the storage says the same: a damaged one may say anything."""


def fetched(remote: Remote, part: StoredShard) -> bytes:
    """Read a shard from storage; bytes that differ from its record are read once more.

    Raises CacheError if the storage has other bytes: it is damaged, or another cache has taken its place.
    """
    reason: str | None = None
    for _ in range(2):
        try:
            data = _read(remote, part)
        except FileNotFoundError:
            reason = f"{part.name} is not there ({remote}/{part.key})"
        except RemoteError:
            reason = wrong_size(part, _size(remote, part.key), str(remote))
            if reason is None:
                raise
        else:
            reason = wrong_digest(part, sound_digest(io.BytesIO(data), part), str(remote))
            if reason is None:
                return data
    raise CacheError(
        f"{remote} is damaged: {reason}, or it has changed since it was opened.\n"
        f"  Fix: open it again; `logitcache verify {remote} --repair RECIPE` writes just what is damaged again"
    )


def _read(remote: Remote, part: StoredShard) -> bytes:
    if part.size > UNUSUAL and _size(remote, part.key) != part.size:
        raise RemoteError(f"{remote}/{part.key} has another size")
    if part.size > PART:
        return remote.read(part.key, part.size)
    return remote.read_range(part.key, 0, part.size)  # one request, where the size is known


def _size(remote: Remote, key: str) -> int | None:
    try:
        return remote.size(key)
    except FileNotFoundError:
        return None
