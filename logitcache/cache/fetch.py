"""Read a shard from storage: whole, and as its commit record says."""

import hashlib
from collections.abc import Callable

from logitcache.cache.arrays import StoredShard
from logitcache.cache.place import wrong_digest, wrong_size
from logitcache.errors import CacheError, RemoteError
from logitcache.remote import PART, Remote

UNUSUAL = 256 << 20
"""Bytes from which on a record is not believed before the storage says the same: a damaged one may say anything."""


def fetched(
    remote: Remote, part: StoredShard, renewed: Callable[[StoredShard], StoredShard]
) -> tuple[StoredShard, bytes]:
    """Return a shard with its record, and its bytes; what differs is read once more, with the record that is `renewed`.

    Raises CacheError where the storage has other bytes.
    """
    reason: str | None = None
    for attempt in range(2):
        try:
            part = renewed(part) if attempt else part
            data = _read(remote, part)
        except FileNotFoundError:
            reason = f"{part.name} is not there ({remote}/{part.key})"
        except RemoteError:
            reason = wrong_size(part, _size(remote, part.key), str(remote))
            if reason is None:
                raise
        else:
            reason = wrong_digest(part, hashlib.sha256(data).digest(), str(remote))
            if reason is None:
                return part, data
    raise CacheError(
        f"{remote} is damaged: {reason}.\n"
        f"  Fix: `logitcache verify {remote} --repair RECIPE`, which writes just what is damaged again"
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
