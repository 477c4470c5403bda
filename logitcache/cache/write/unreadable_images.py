"""Images that could not be read: the only ones whose content may be another when a run continues."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.samples import read_digests
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import parse_json
from logitcache.store.shards import Shard

FILE = "digest/unreadable"
"""Not in the root, which readers of Zarr would not understand."""


def note_unreadable(store: Store, rows: Iterable[int]) -> None:
    """Remember the rows of images that stopped a run."""
    noted = sorted(_noted(store) | set(rows))
    if noted:
        store.write(FILE, json.dumps(noted).encode())


def forget_unreadable(store: Store) -> None:
    """Forget them, once the images are those of the manifest."""
    if store.exists(FILE):
        store.remove([FILE])


def with_repaired_images(
    store: Store, recorded: Manifest, wanted: Manifest, digests: NDArray[np.uint64], committed: Iterable[Shard]
) -> Manifest:
    """Take over from `wanted` the content of images that stopped a run and were repaired since.

    Only if nothing else changed and no shard that any teacher has committed holds an answer for them; else returns
    what is recorded.
    """
    repaired = wanted.fingerprint.model_dump(include={"content", "sizes"})
    content = recorded.fingerprint.model_copy(update=repaired)
    if recorded.fingerprint == wanted.fingerprint or content != wanted.fingerprint:
        return recorded
    changed = _changed(store, recorded, digests)
    if not changed or not changed <= _noted(store) or _answered(recorded, committed, changed):
        return recorded
    now = {(canary.view, canary.index): canary for canary in wanted.canaries}
    canaries = tuple(now.get((old.view, old.index), old) if old.index in changed else old for old in recorded.canaries)
    return recorded.model_copy(update={"fingerprint": content, "canaries": canaries})


def _answered(manifest: Manifest, committed: Iterable[Shard], changed: set[int]) -> bool:
    """Whether a committed shard holds an answer to one of the images, alone or mixed with another."""
    rows = np.array(sorted(changed), dtype=np.int64)
    mixed = manifest.partners(manifest.views.answered())
    for shard in committed:
        partners = rows if mixed is None else mixed.partners(np.full_like(rows, shard.view), rows)
        seen = np.concatenate([rows, partners])
        if ((shard.start <= seen) & (seen < shard.stop)).any():
            return True
    return False


def _changed(store: Store, recorded: Manifest, digests: NDArray[np.uint64]) -> set[int]:
    try:
        before = read_digests(store, recorded)
    except CacheError:
        return set()
    if hashlib.sha256(before.tobytes()).hexdigest() != recorded.fingerprint.content:
        return set()
    return set(np.flatnonzero(before != digests).tolist())


def _noted(store: Store) -> set[int]:
    try:
        return set(parse_json(store.read(FILE)))
    except (OSError, ValueError, TypeError):
        return set()
