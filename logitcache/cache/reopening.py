"""What this machine found when it opened a cache before, used again while the files look as they did then.

Sizes, times and inodes are compared, those of the folders of commit records included. Whatever verifies or writes a
cache reads every file again.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import zarr

from logitcache.cache.format.arrays import ArrayGroup
from logitcache.cache.format.commits import Records, read_records
from logitcache.cache.format.derivation import fix_of_damage
from logitcache.cache.format.layout import layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import ROOT, skeleton_limits, skeleton_problems
from logitcache.errors import CacheError
from logitcache.store import digest_index
from logitcache.store.base import Store
from logitcache.store.files import keep, kept, memory_of
from logitcache.store.safe_files import open_folder
from logitcache.store.shards import RECORD_BYTES

SHOWN = 5

FEW = 1024
"""Commit records of a group that are read at every opening: not even a change in place is missed then."""


def require_sound_skeleton(store: Store, manifest: Manifest) -> None:
    """Raise CacheError naming the damaged files of a cache's skeleton; known to be sound, they are not read."""

    def state() -> bytes | None:
        paths = [store.path / key for key in skeleton_limits(manifest)]
        return digest_index.state(paths, manifest.digest(), zarr.__version__, version("logitcache"))

    memory, before = memory_of(str(store.path.absolute()), "skeleton"), state()
    if before is not None and kept(memory) == before:
        return
    problems = list(skeleton_problems(store, manifest))
    if problems:
        texts = "\n  ".join(problem.text for problem in problems[:SHOWN])
        raise CacheError(f"{store} is damaged:\n  {texts}\n  {fix_of_damage(manifest)}")
    if before is not None and state() == before:
        keep(memory, before)


def remembered_records(store: Store, manifest: Manifest) -> Mapping[str, Records]:
    """Return the commit records of a large local cache by group; those of folders that have not changed are remembered.

    A record that is written over in place leaves no trace in its folder: shards must match the remembered one then.
    Of other caches nothing is remembered.
    """
    layout = layout_of(manifest)
    if layout.num_shards <= FEW or not store.is_local:  # a mirror changes records in place
        return {}
    return {group.name: _records(store, manifest, group) for group in layout.groups}


def _records(store: Store, manifest: Manifest, group: ArrayGroup) -> Records:
    layout, width = layout_of(manifest), RECORD_BYTES * len(group.arrays)

    def state() -> bytes | None:
        paths = [store.path / group.commits, store.path / group.commits / ROOT]
        return digest_index.state(paths, manifest.digest(), version("logitcache"), _names(store, group))

    memory, before = memory_of(str(store.path.absolute() / group.commits), "records"), state()
    payload = kept(memory) if before is not None else None
    if before is not None and payload is not None and payload.startswith(before):
        count = (len(payload) - len(before)) // (8 + width)
        numbers = np.frombuffer(payload, np.int64, count, len(before))
        values = np.frombuffer(payload, np.uint8, count * width, len(before) + numbers.nbytes)
        return Records(layout.num_shards, numbers, values.reshape(count, width), {})
    found = read_records(store, layout, group)
    if before is not None and not found.damaged and state() == before:
        keep(memory, before + found.numbers.tobytes() + found.values.tobytes())
    return found


def _names(store: Store, group: ArrayGroup) -> list[str]:
    """List the names in the folder of commit records: not every file system stamps its folders."""
    folder = open_folder(store.path, group.commits)
    if folder is None:
        return []
    try:
        return sorted(os.listdir(folder))
    finally:
        os.close(folder)
