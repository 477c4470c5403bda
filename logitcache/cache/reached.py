"""The errors that encodings reached over all rows, in the manifest of a cache that is whole."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from logitcache.cache.arrays import ArrayGroup, Shard
from logitcache.cache.copies import place_of
from logitcache.cache.layout import layout_of
from logitcache.cache.manifest import LOGITS, Manifest
from logitcache.cache.row_errors import RowErrors, summary
from logitcache.cache.skeleton import ROOT, metadata_files
from logitcache.cache.unpack import Unpacker
from logitcache.cache.verify import bring


def errors_of(root: Path, manifest: Manifest, group: ArrayGroup, shards: Iterable[Shard]) -> RowErrors | None:
    """Add up the errors of some committed shards; None where there are none, or where they are not recorded."""
    if group.errors is None:
        return None
    unpack, shards = Unpacker(root, group.errors), list(shards)
    bring(root, group.errors, shards)  # many small ones, several at a time
    found = [unpack(shard)[0] for shard in shards]
    logits = manifest.teachers[group.teacher].logits
    temperature = logits.temperature_of_errors if group.target == LOGITS and logits is not None else None
    return summary(np.stack(found), temperature) if found else None


def with_errors(root: Path, manifest: Manifest) -> Manifest:
    """Return the manifest of a cache that is whole with the errors over all rows."""
    layout = layout_of(manifest)
    teachers = dict(manifest.teachers)
    for name, entry in teachers.items():
        found = {group.target: errors_of(root, manifest, group, layout.shards()) for group in layout.of(name)}
        errors = {target: value for target, value in found.items() if value is not None}
        teachers[name] = entry.model_copy(update={"errors": errors})
    return manifest.model_copy(update={"teachers": teachers})


def note_errors(root: Path, manifest: Manifest) -> None:
    """Write the errors over all rows into the root of a cache that is whole, unless they are there."""
    lacking = (
        group
        for group in layout_of(manifest).targets
        if group.errors is not None and group.target not in manifest.teachers[group.teacher].errors
    )
    if any(lacking):
        place_of(root).write(ROOT, metadata_files(with_errors(root, manifest))[ROOT])
