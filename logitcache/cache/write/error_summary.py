"""The errors that encodings reached over all rows, in the manifest of a cache that is whole."""

from collections.abc import Iterable

import numpy as np

from logitcache.cache.format.arrays import ArrayGroup
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.root import ROOT
from logitcache.cache.format.row_errors import NUM_STATISTICS, RowErrors, summary
from logitcache.cache.snapshot import Snapshot
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
