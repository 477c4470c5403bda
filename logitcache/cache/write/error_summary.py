"""The errors that encodings reached over all rows, in the manifest of a cache that is whole."""

from collections.abc import Iterable, Mapping

import numpy as np

from logitcache.cache.format.arrays import ArrayGroup
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.metadata import ROOT, metadata_files
from logitcache.cache.format.row_errors import NUM_STATISTICS, RowErrors, summary
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.growth import forget_staged
from logitcache.cache.write.writer import commit_record
from logitcache.cache.write.writer_locks import PREPARING, WRITING
from logitcache.store.base import Store
from logitcache.store.files import explained
from logitcache.store.shards import Shard


def errors_of(snapshot: Snapshot, group: ArrayGroup, shards: Iterable[Shard]) -> tuple[RowErrors, ...]:
    """Add up the errors of some committed shards, by temperature; none without shards, or if they are not recorded."""
    if group.errors is None:
        return ()
    stored, shards = snapshot.array(group.errors), list(shards)
    stored.ensure(shards)  # many small ones, several at a time
    found = [stored.rows(shard)[0].reshape(-1, NUM_STATISTICS) for shard in shards]
    if not found:
        return ()
    temperatures = snapshot.manifest.teachers[group.teacher].error_temperatures if group.target == LOGITS else None
    statistics = np.stack(found, axis=1)
    return tuple(summary(one, at) for one, at in zip(statistics, temperatures or (None,), strict=True))


def with_errors(snapshot: Snapshot) -> Manifest:
    """Return the manifest of a cache that is whole with the errors over all rows."""
    layout, manifest = snapshot.layout, snapshot.manifest
    teachers = dict(manifest.teachers)
    for name, entry in teachers.items():
        errors: dict[str, RowErrors | tuple[RowErrors, ...]] = {}
        for group in layout.of(name):
            if group.errors is not None:
                found = errors_of(snapshot, group, layout.shards())
                errors[group.target] = found if len(group.errors.row_shape) > 1 else found[0]
        teachers[name] = entry.model_copy(update={"errors": errors})
    return manifest.model_copy(update={"teachers": teachers})


def note_errors(snapshot: Snapshot) -> None:
    """Write the errors over all rows into the root of a cache that is whole, unless they are there."""
    lacking = (
        group
        for group in snapshot.layout.targets
        if group.errors is not None and group.target not in snapshot.manifest.teachers[group.teacher].errors
    )
    if any(lacking):
        snapshot.store.write(ROOT, metadata_files(with_errors(snapshot))[ROOT])


def finish_growth(grown: Snapshot, samples: Mapping[str, bytes]) -> None:
    """Let the root describe the grown cache, all shards of which are committed, with the errors over all rows.

    `samples` are the files of the samples of its images, by key. Staged shards take the place of those that they
    begin with; a reader that has these makes their bytes of the new ones.
    """
    _place_staged(grown)
    files = {**samples, **metadata_files(grown.manifest)}
    _update(grown.store, {key: data for key, data in files.items() if key != ROOT})
    _update(grown.store, {ROOT: metadata_files(with_errors(grown))[ROOT]})
    if samples:
        forget_staged(grown.store, grown.manifest)


def _place_staged(grown: Snapshot) -> None:
    """Write the staged shards under the keys of the cache, each array before the records of its group."""
    unstaged = [group.unstaged() for group in grown.layout.groups]
    for shard in filter(grown.layout.is_staged, grown.shards if grown.layout.staged else ()):
        for group, final in zip(grown.layout.groups, unstaged, strict=True):
            records = []
            for part, array in zip(grown.stored(group, shard), final.arrays, strict=True):
                data = memoryview(grown.store.read_shard(part))
                grown.store.write(array.file(shard), data)
                records.append(commit_record(data, array.file(shard)))
            grown.store.write(final.record_file(shard), b"".join(records))


def _update(store: Store, files: Mapping[str, bytes]) -> None:
    for key, data in files.items():
        if store.holds(key, data):
            continue
        if key in (PREPARING, WRITING):
            store.rewrite(key, data)
        else:
            with explained(store.path / key):
                (store.path / key).parent.mkdir(parents=True, exist_ok=True)
            store.write(key, data)
