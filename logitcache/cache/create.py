"""Create a cache: its skeleton appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from logitcache.cache.copies import place_of
from logitcache.cache.layout import require_possible
from logitcache.cache.manifest import Manifest, parse_manifest
from logitcache.cache.sharing import PREPARING, explained
from logitcache.cache.skeleton import ROOT, Samples, metadata_files
from logitcache.errors import CacheError


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the cache at `path`."""
    file, place = path / ROOT, place_of(path)
    where = f"{place}/{ROOT}"
    try:
        if not file.is_file():
            found = f"is no cache (it has no {ROOT})" if path.exists() else "does not exist"
            raise CacheError(f"{place} {found}. Fix: check the path, or make it with `logitcache precompute`")
        stored = json.loads(file.read_bytes())
        attributes = stored["attributes"] if stored["node_type"] == "group" else {}
    except OSError as error:
        raise CacheError(f"{where} cannot be read: {error.strerror}. Fix: make it readable") from error
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{where} is damaged: {type(error).__name__}: {error}. Fix: restore it, or remove {place} and make it again"
        ) from error
    manifest = parse_manifest(attributes, str(place))
    require_possible(manifest, str(place))
    return manifest


def create_skeleton(
    target: Path, path: Path, manifest: Manifest, samples: Samples, tables: Mapping[str, bytes]
) -> None:
    """Write metadata, tables (bytes by key) and what is known of the images into `target`, then rename it to `path`.

    The file that carries the lock of whoever prepares is filled in place.
    """
    files, place = {**metadata_files(manifest), **samples.files(), **tables}, place_of(path)
    with explained(path), place.creating():
        place.create(files, ROOT)
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
