"""Create a cache: its skeleton appears whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.root import ROOT
from logitcache.cache.format.samples import Samples
from logitcache.cache.write.writer_locks import PREPARING
from logitcache.store.base import Store
from logitcache.store.files import explained, sync_directory


def create_skeleton(
    target: Path, store: Store, manifest: Manifest, samples: Samples, tables: Mapping[str, bytes]
) -> None:
    """Write metadata, tables (bytes by key) and samples into `target`, then rename it to the folder of the cache."""
    files, path = {**metadata_files(manifest), **samples.files(), **tables}, store.path
    with explained(path), store.creating(files, ROOT):
        for leftover in [*target.iterdir(), *(target / PREPARING).parent.iterdir()]:
            if leftover not in (target / PREPARING, (target / PREPARING).parent):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for key, data in files.items():
            (target / key).parent.mkdir(parents=True, exist_ok=True)
            with open(target / key, "wb") as file:  # in place: one of them carries a lock
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for folder, _, _ in os.walk(target):
            sync_directory(Path(folder))
        target.replace(path)
        sync_directory(path.parent)
