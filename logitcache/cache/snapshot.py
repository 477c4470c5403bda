"""An opened cache as a value: its store, its manifest, and the commit records that were read when it was opened.

The results of checks are reused while sizes, times and inodes of the files, and of the folders of commit records, stay
the same. Commands that verify or write a cache read every file again.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout
from logitcache.cache.format.commits import Records, are_records, read_records, reread_records
from logitcache.cache.format.derivation import fix_of_damage
from logitcache.cache.format.growth import is_outgrown, read_growth
from logitcache.cache.format.layout import Layout, layout_of, staged_between
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import skeleton_limits, skeleton_problems
from logitcache.cache.format.root import ROOT, read_manifest
from logitcache.cache.read.stored_array import StoredArray
from logitcache.cache.refresh import refresh
from logitcache.errors import CacheError
from logitcache.store import digest_index
from logitcache.store.base import Store
from logitcache.store.files import memory_file, read_memory, write_memory
from logitcache.store.local import LocalStore
from logitcache.store.mirror import mirror_of
from logitcache.store.remote.client import is_remote
from logitcache.store.safe_files import open_folder
from logitcache.store.shards import RECORD_BYTES, Shard, StoredShard

SHOWN = 5

FEW = 1024
"""Up to this number of commit records of a group are read at every opening, which detects even changes in place."""


def require_sound_skeleton(store: Store, manifest: Manifest) -> None:
    """Raise CacheError naming damaged files of a cache's skeleton; unchanged files that passed before are not read."""

    def state() -> bytes | None:
        paths = [store.path / key for key in skeleton_limits(manifest)]
        return digest_index.state(paths, manifest.digest(), version("zarr"), version("logitcache"))

    memory, before = memory_file(str(store.path.absolute()), "skeleton"), state()
    if before is not None and read_memory(memory) == before:
        return
    problems = list(skeleton_problems(store, manifest))
    if problems:
        texts = "\n  ".join(problem.text for problem in problems[:SHOWN])
        raise CacheError(f"{store} is damaged:\n  {texts}\n  {fix_of_damage(manifest)}")
    if before is not None and state() == before:
        write_memory(memory, before)


def remembered_records(store: Store, manifest: Manifest) -> Mapping[str, Records]:
    """Return the commit records of a large local cache by group, from memory if their folders have not changed.

    A record that is overwritten in place does not change its folder: its shard must then match the remembered record.
    Returns nothing for other caches.
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

    memory, before = memory_file(str(store.path.absolute() / group.commits), "records"), state()
    payload = read_memory(memory) if before is not None else None
    if before is not None and payload is not None and payload.startswith(before):
        count = (len(payload) - len(before)) // (8 + width)
        numbers = np.frombuffer(payload, np.int64, count, len(before))
        values = np.frombuffer(payload, np.uint8, count * width, len(before) + numbers.nbytes)
        return Records(layout.num_shards, numbers, values.reshape(count, width), {}, layout.shards_per_view)
    found = read_records(store, layout, group)
    if before is not None and not found.damaged and state() == before:
        write_memory(memory, before + found.numbers.tobytes() + found.values.tobytes())
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


@dataclass(frozen=True)
class Snapshot:
    """A cache as it was when opened: later changes of the store raise an error, or appear in a new snapshot.

    `records`, by the name of a group, decide which bytes are its shards. `recorded` is the
    manifest in the root; `manifest` is the same, a part of it, or the manifest of a growth. A snapshot can be pickled:
    each process opens the store itself, and reads this very cache.
    """

    store: Store
    manifest: Manifest
    records: Mapping[str, Records]
    recorded: Manifest

    @classmethod
    def read(cls, store: Store) -> Self:
        """Read the manifest of a cache, and all commit records."""
        return cls.as_described(store, read_manifest(store))

    @classmethod
    def as_described(
        cls,
        store: Store,
        manifest: Manifest,
        known: Mapping[str, Records] | None = None,
        recorded: Manifest | None = None,
    ) -> Self:
        """Return the state of a cache by a given manifest; commit records that are not `known` are read.

        `recorded` is the manifest in the root, by default the same.
        """
        recorded, known = recorded or manifest, known or {}
        layout = layout_of(manifest, staged_between(recorded, manifest))
        groups = {group.name: group for group in layout.groups}
        records = {name: read_records(store, layout, group, known.get(name)) for name, group in groups.items()}
        return cls(store, manifest, records, recorded)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.store, self.manifest, self.records, self.recorded)

    def of(self, manifest: Manifest) -> "Snapshot":
        """Return the same cache by another manifest: with more views, targets or images, or fewer."""
        return Snapshot.as_described(self.store, manifest, self.records, self.recorded)

    def refreshed(self) -> "Snapshot":
        """Return the cache as it is now: other processes and machines may have committed more."""
        store = self.store if self.store.is_local else locate(str(self.store))
        return Snapshot.as_described(store, self.manifest, recorded=self.recorded)

    def reread(self, shards: Iterable[Shard]) -> "Snapshot":
        """Return the cache with the commit records of some shards read again; nothing is listed."""
        shards = list(shards)
        records = {
            group.name: reread_records(self.store, self.layout, group, self.records[group.name], shards)
            for group in self.layout.groups
        }
        return replace(self, records=records)

    def growing(self) -> "Snapshot":
        """Return the cache that this one grows to; the same cache if it does not grow."""
        return self.of(read_growth(self.store, self.manifest))

    @cached_property
    def layout(self) -> Layout:
        """The arrays, and how they are cut into shards."""
        return layout_of(self.manifest, staged_between(self.recorded, self.manifest))

    @property
    def identity(self) -> str:
        """The digest of the manifest in the root."""
        return self.recorded.digest()

    @cached_property
    def fix(self) -> str:
        """The command that writes what is missing or damaged."""
        return fix_of_damage(self.manifest)

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards that are committed in every group, in order; all shards of a cache restricted to no targets."""
        numbers = [self._numbers(group) for group in self.layout.groups] or [np.arange(self.layout.num_shards)]
        common = functools.reduce(lambda one, other: np.intersect1d(one, other, assume_unique=True), numbers)
        return self._shards_of(common)

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return len(self.shards) == self.layout.num_shards

    def committed(self) -> dict[str, set[Shard]]:
        """Return the committed shards of each group."""
        return {group.name: set(self._shards_of(self._numbers(group))) for group in self.layout.groups}

    def damaged_records(self, group: ArrayGroup) -> dict[Shard, str]:
        """Return the defects of damaged commit records of a group, by shard."""
        found = self.records[group.name].damaged
        found = {number: text for number, text in found.items() if number < self.layout.num_shards}
        return dict(zip(self._shards_of(np.fromiter(found, np.int64, len(found))), found.values(), strict=True))

    def missing(self, shard: Shard) -> list[str]:
        """Name the groups of arrays in which a shard is not committed by now, also by other processes."""
        return [group.name for group in self.layout.groups if not self._is_committed(group, shard)]

    def stored(self, group: ArrayGroup, shard: Shard) -> list[StoredShard]:
        """Return a shard of every array with its record; raise CacheError if it is not committed."""
        return [self.array(array).stored(shard) for array in group.arrays]

    def array(self, layout: ArrayLayout) -> StoredArray:
        """Return one array of the cache."""
        outgrown = functools.partial(is_outgrown, self.store, *self.manifest.extent)
        return StoredArray(self.store, layout, self.records[layout.group], self.fix, outgrown)

    def _is_committed(self, group: ArrayGroup, shard: Shard) -> bool:
        try:
            data = self.store.read(group.record_file(shard))
        except (FileNotFoundError, CacheError):
            # Staged shards are removed once the root describes the grown cache.
            return self.layout.is_staged(shard) and read_manifest(self.store).num_images >= self.manifest.num_images
        return are_records(self.layout, group, shard, data)

    def _numbers(self, group: ArrayGroup) -> NDArray[np.int64]:
        numbers = self.records[group.name].numbers
        return numbers[: np.searchsorted(numbers, self.layout.num_shards)]

    def _shards_of(self, numbers: NDArray[np.int64]) -> list[Shard]:
        views, places = np.divmod(numbers, self.layout.shards_per_view)
        starts = places * self.layout.shard_rows
        stops = np.minimum(starts + self.layout.shard_rows, self.layout.num_images)
        return list(map(Shard, views.tolist(), starts.tolist(), stops.tolist()))


def open_snapshot(location: str | Path, *, fresh: bool = False) -> Snapshot:
    """Open a cache, finished or not, in a folder or at a URL; `fresh` as for `locate`. Raises CacheError."""
    return Snapshot.read(locate(location, fresh=fresh))


def locate(location: str | Path, *, fresh: bool = False) -> Store:
    """Return the store at a location; the mirror of a cache at a URL is refreshed before, all but its shards.

    `fresh` reads every file from the storage even if the mirror seems to have it. Raises RemoteError if the storage
    does not answer.
    """
    if not is_remote(location):
        return LocalStore(Path(location))
    mirror = mirror_of(os.fspath(location))
    refresh(mirror, fresh)
    return mirror
