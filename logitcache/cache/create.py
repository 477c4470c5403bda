"""Create a cache: its skeleton appears whole or not at all, and has one writer."""

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore

from logitcache.cache.layout import layout_of
from logitcache.cache.manifest import Manifest, parse_manifest
from logitcache.errors import CacheError

LABELS, DIGESTS, CANARIES = "label", "digest", "canary"


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the cache at `path`."""
    if not (path / "zarr.json").is_file():
        found = "is no cache (it has no zarr.json)" if path.exists() else "does not exist"
        raise CacheError(f"{path} {found}. Fix: check the path, or make it with `logitcache precompute`")
    try:
        group = zarr.open_group(LocalStore(path, read_only=True), mode="r", use_consolidated=False)
        attributes = group.attrs.asdict()
    except (ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError) as error:
        raise CacheError(f"{path}/zarr.json is damaged: {error}. Fix: restore it, or precompute again") from error
    return parse_manifest(attributes, str(path))


@contextmanager
def writer_lock(path: Path) -> Iterator[Path]:
    """Hold the only right to write at `path`; yields where to write: `path`, or a directory beside it when it is new.

    The lock is on the directory itself, goes with it when it is renamed, and ends with the process.
    """
    target = path if (path / "zarr.json").exists() else path.with_name(path.name + ".creating")
    if target != path and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CacheError(f"{path} exists and is no cache: nothing is overwritten. Fix: name another path, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    lock = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError(f"{path} is being written by another precompute. Fix: wait for it, or stop it") from error
        yield target
    finally:
        os.close(lock)


def create_skeleton(
    target: Path,
    path: Path,
    manifest: Manifest,
    labels: NDArray[np.int64],
    digests: NDArray[np.uint64],
    canaries: NDArray[np.uint8],
) -> None:
    """Write metadata and what is known of the images into `target`, then rename it to `path`."""
    for leftover in target.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    store = LocalStore(target)
    group = zarr.create_group(store, attributes={"logitcache": manifest.attributes()})
    for options in skeleton_arrays(manifest):
        group.create_array(**options)
    for name, values in ((LABELS, labels), (DIGESTS, digests), (CANARIES, canaries)):
        array = group[name]
        assert isinstance(array, zarr.Array)
        array[...] = values
    with warnings.catch_warnings():
        # Not yet in the specification, but every reader either uses it or passes over it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    sync_tree(target)
    target.replace(path)
    _sync(path.parent)


def skeleton_arrays(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the arguments of zarr.create_array for every array of a cache."""
    count = manifest.num_images
    pixels = (len(manifest.canaries), *manifest.image_shape)
    plain: dict[str, Any] = {"compressors": None, "config": {"write_empty_chunks": True}}
    yield {
        "name": LABELS,
        "shape": (count,),
        "chunks": (count,),
        "dtype": "<i8",
        "fill_value": -1,
        "dimension_names": ("sample",),
        **plain,
    }
    yield {
        "name": DIGESTS,
        "shape": (count,),
        "chunks": (count,),
        "dtype": "<u8",
        "fill_value": 0,
        "dimension_names": ("sample",),
        **plain,
    }
    dims = ("canary", "channel", "height", "width")
    yield {
        "name": CANARIES,
        "shape": pixels,
        "chunks": pixels,
        "dtype": "uint8",
        "fill_value": 0,
        "dimension_names": dims,
        **plain,
    }
    layout = layout_of(manifest)
    for teacher in layout.teachers:
        for array in teacher.arrays:
            yield array.zarr_options()
        yield layout.commit_options(teacher)


def sync_tree(root: Path) -> None:
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
