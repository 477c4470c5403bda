"""Create a cache: its skeleton appears whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import ROOT, Samples, metadata_files
from logitcache.cache.write.claims import PREPARING, explained
from logitcache.store.base import Store


def create_skeleton(
    target: Path, store: Store, manifest: Manifest, samples: Samples, tables: Mapping[str, bytes]
) -> None:
    """Write metadata, tables (bytes by key) and what is known of the images into `target`, then rename it in place.

    The file that carries the lock of whoever prepares is filled in place.
    """
    files, path = {**metadata_files(manifest), **samples.files(), **tables}, store.path
    with explained(path), store.creating():
        store.create(files, ROOT)
        for leftover in [*target.iterdir(), *(target / PREPARING).parent.iterdir()]:
            if leftover not in (target / PREPARING, (target / PREPARING).parent):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for key, data in files.items():
            (target / key).parent.mkdir(parents=True, exist_ok=True)
            (target / key).write_bytes(data)
        _sync_tree(target)
        target.replace(path)
        _sync(path.parent)


def _sync_tree(root: Path) -> None:
    """Flush every file and directory below `root` to the disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
