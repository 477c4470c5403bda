"""The skeleton of a cache: all but the shards, which is there before a teacher answers."""

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, cpu
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from logitcache.cache.format.label_file import label_file, label_key, labels_of
from logitcache.cache.format.layout import layout_of
from logitcache.cache.format.manifest import Manifest, parse_manifest
from logitcache.cache.format.manifest_diff import extends
from logitcache.errors import CacheError
from logitcache.store.arrays import NOT_FINITE, ArrayGroup, is_finite
from logitcache.store.base import Store
from logitcache.store.safe_files import parse_json
from logitcache.views.canaries import pixel_digest
from logitcache.views.datasets.base import Labels, label_dtype

ROOT = "zarr.json"
DIGESTS, CANARIES = "digest/c/0", "canary/c/0/0/0/0"
"""Each of these arrays is one uncompressed chunk: its file is its values."""

GROWING = "digest/growing"
"""What a cache is to become: not in the root, where readers of Zarr would wonder at it."""


class Samples(NamedTuple):
    """What is known of the images: labels [N] or [N, C], digests [N], the pixels of the canaries [K, C, H, W]."""

    labels: Labels
    digests: NDArray[np.uint64]
    canaries: NDArray[np.uint8]

    def files(self) -> dict[str, bytes]:
        """Return the stored bytes by key."""
        return {
            label_key(self.labels.ndim): self.labels.astype(label_dtype(self.labels.ndim)).tobytes(),
            DIGESTS: self.digests.astype("<u8").tobytes(),
            CANARIES: self.canaries.tobytes(),
        }


class Problem(NamedTuple):
    """A file that is not what the manifest says."""

    key: str
    text: str


def read_labels(store: Store, manifest: Manifest) -> Labels:
    """Read the labels as stage one saw them, int64 [N] or int8 [N, C]; -1 where there is none."""
    file = label_file(manifest.fingerprint)
    data = _read(store, file.key, file.num_bytes)
    try:
        return labels_of(data, manifest.fingerprint).astype(file.dtype.newbyteorder("="))
    except ValueError as error:
        raise CacheError(f"{store}/{file.key}: {error}") from error


def read_digests(store: Store, manifest: Manifest) -> NDArray[np.uint64]:
    """Read the digests of the images as stage one saw them, [N]."""
    return np.frombuffer(_read(store, DIGESTS, 8 * manifest.num_images), "<u8").astype(np.uint64)


def read_canaries(store: Store, manifest: Manifest) -> NDArray[np.uint8]:
    """Read the pixels of the canaries, [K, C, H, W]."""
    shape = (len(manifest.canaries), *manifest.image_shape)
    return np.frombuffer(bytearray(_read(store, CANARIES, math.prod(shape))), np.uint8).reshape(shape)


def _read(store: Store, key: str, size: int) -> bytes:
    """Read a file of a known size: whatever a manifest claims, no more than is there is allocated."""
    try:
        data = store.read(key, size)
    except FileNotFoundError as error:
        raise CacheError(f"{store}/{key} cannot be read: {error.strerror or 'it is missing'}") from error
    if len(data) != size:
        raise CacheError(f"{store}/{key} has {len(data)} bytes, the manifest implies {size}")
    return data


def read_tables(store: Store, group: ArrayGroup) -> dict[str, NDArray[Any]]:
    """Read the tables of a group by their own names; raise CacheError where they are not those of the manifest."""
    tables = {}
    for table in group.tables:
        data = _read(store, table.file, table.num_bytes)
        if hashlib.sha256(data).hexdigest() != table.sha256:
            raise CacheError(f"{store}/{table.file}: its values differ from the manifest's digest")
        tables[table.suffix] = np.frombuffer(data, table.dtype).reshape(table.shape)
        if not is_finite(tables[table.suffix]):
            raise CacheError(f"{store}/{table.file}: {NOT_FINITE}")
    return tables


def table_bytes(table: NDArray[Any]) -> bytes:
    """Return the stored bytes of a table, little endian in C order."""
    return np.ascontiguousarray(table).astype(table.dtype.newbyteorder("<")).tobytes()


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Return the metadata of a cache as this zarr-python writes it, by key."""
    return {key: value.to_bytes() for key, value in _metadata(manifest).items()}


def _metadata(manifest: Manifest) -> dict[str, Buffer]:
    files: dict[str, Buffer] = {}
    store = MemoryStore(store_dict=files)
    group = zarr.create_group(store, attributes={"logitcache": manifest.attributes()})
    for options in skeleton_arrays(manifest):
        group.create_array(**options)
    with warnings.catch_warnings():
        # Not yet in the specification, but every reader either uses it or passes over it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    return files


def skeleton_arrays(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the arguments of zarr.create_array for every array of a cache."""
    count, pixels = manifest.num_images, (len(manifest.canaries), *manifest.image_shape)
    _, shape, dtype = label_file(manifest.fingerprint)
    yield _plain("label", shape, dtype.str, -1, ("sample", "class")[: len(shape)])
    yield _plain("digest", (count,), "<u8", 0, ("sample",))
    yield _plain("canary", pixels, "uint8", 0, ("canary", "channel", "height", "width"))
    layout = layout_of(manifest)
    for group in layout.groups:
        for table in group.tables:
            dims = tuple(f"{table.name}.{axis}" for axis in range(len(table.shape)))
            yield _plain(table.name, table.shape, table.dtype.str, 0, dims)
        for array in group.arrays:
            yield array.zarr_options()
        yield layout.commit_options(group)


def _plain(name: str, shape: tuple[int, ...], dtype: str, fill: int, dims: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": shape,
        "chunks": shape,
        "dtype": dtype,
        "fill_value": fill,
        "dimension_names": dims,
        "compressors": None,
        "config": {"write_empty_chunks": True},
    }


def skeleton_problems(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """Compare metadata, tables, labels, image digests and canary pixels with the manifest."""
    yield from _metadata_problems(store, manifest)
    yield from table_problems(store, layout_of(manifest).groups)
    yield from _sample_problems(store, manifest)


def table_problems(store: Store, groups: Iterable[ArrayGroup]) -> Iterator[Problem]:
    """Compare tables with the manifest."""
    for group in groups:
        for table in group.tables:
            try:
                read_tables(store, replace(group, tables=(table,)))
            except CacheError as error:
                yield Problem(table.file, str(error))


def _metadata_problems(store: Store, manifest: Manifest) -> Iterator[Problem]:
    wanted = _metadata(manifest)
    # Another release of zarr may write the same in other words.
    read = _as_written if manifest.versions.get("zarr") == zarr.__version__ else _understood
    growing = {f"{array['name']}/{ROOT}" for array in skeleton_arrays(manifest)}
    growing -= {f"{name}/{ROOT}" for name in ("label", "digest", "canary")}
    for key in [f"{options['name']}/{ROOT}" for options in skeleton_arrays(manifest)]:
        with _compared(store, key) as problems:
            found, implied = read(store.read(key), key), read(wanted[key].to_bytes(), key)
            if found != implied and not (key in growing and _is_grown(store, found, implied)):
                problems.append(_other(store, key))
        yield from problems
    with _compared(store, ROOT) as problems:
        stored = store.read(ROOT)
        # A cache that has grown meanwhile agrees with the manifest that it has now.
        now = parse_manifest(parse_json(stored)["attributes"], str(store))
        implied = read((wanted if now == manifest else _metadata(now))[ROOT].to_bytes(), ROOT)
        if _without_manifest(read(stored, ROOT)) != _without_manifest(implied) or not extends(now, manifest):
            problems.append(_other(store, ROOT))
    yield from problems


@contextlib.contextmanager
def _compared(store: Store, key: str) -> Iterator[list[Problem]]:
    """Gather the problems of metadata that are read and compared within."""
    problems: list[Problem] = []
    try:
        yield problems
    except FileNotFoundError:
        problems.append(Problem(key, f"{store}/{key} cannot be read: it is missing"))
    except CacheError as error:
        problems.append(Problem(key, str(error)))
    except Exception as error:  # zarr raises anything for damaged metadata
        problems.append(Problem(key, f"{store}/{key} is damaged: {type(error).__name__}: {error}"))


def _other(store: Store, key: str) -> Problem:
    return Problem(key, f"{store}/{key} does not describe what the manifest implies")


def _is_grown(store: Store, found: Any, implied: Any) -> bool:
    """Whether an array's metadata differ from what is implied by more views alone, as those of a cache that grows do.

    All of these views are committed by then, and the root follows. It is read last: what grew earlier is in it.
    """
    views, others = found["shape"][0], {**found, "shape": [implied["shape"][0], *found["shape"][1:]]}
    if others != implied or not views > implied["shape"][0]:
        return False
    try:
        growing = parse_json(store.read(GROWING))["num_views"]
    except FileNotFoundError:
        growing = 0
    now = parse_json(store.read(ROOT))["attributes"]["logitcache"]["manifest"]["views"]["num_views"]
    return bool(views <= max(growing, now))


def _as_written(stored: bytes, key: str) -> Any:
    return parse_json(stored)


def _understood(stored: bytes, key: str) -> Any:
    store = MemoryStore(store_dict={ROOT: cpu.Buffer.from_bytes(stored)})
    if key == ROOT:
        found = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=True).metadata.to_dict()
    else:
        found = dict(zarr.open_array(store, mode="r", zarr_format=3).metadata.to_dict())
    return json.loads(json.dumps(found))


def _without_manifest(found: Any) -> Any:
    """Leave out the manifest, which has its own digest."""
    return {name: value for name, value in found.items() if name != "attributes"}


def _sample_problems(store: Store, manifest: Manifest) -> Iterator[Problem]:
    recorded = manifest.fingerprint
    labels = label_file(recorded)
    for key, size, digest in (
        (labels.key, labels.num_bytes, recorded.labels),
        (DIGESTS, 8 * recorded.num_images, recorded.content),
    ):
        try:
            data = _read(store, key, size)
            if hashlib.sha256(data).hexdigest() != digest:
                yield Problem(key, f"{store}/{key}: its values differ from the manifest's digest")
            elif key == labels.key:
                labels_of(data, recorded)
        except CacheError as error:
            yield Problem(key, str(error))
        except ValueError as error:
            yield Problem(key, f"{store}/{key}: {error}")
    try:
        pixels = read_canaries(store, manifest)
    except CacheError as error:
        yield Problem(CANARIES, str(error))
        return
    for number, canary in enumerate(manifest.canaries):
        if pixel_digest(pixels[number]) != canary.augmented:
            yield Problem(
                CANARIES, f"{store}/{CANARIES}: the pixels of canary {number} differ from the manifest's digest"
            )


def skeleton_keys(manifest: Manifest) -> list[str]:
    """List the files that `skeleton_problems` compares."""
    arrays = [f"{options['name']}/{ROOT}" for options in skeleton_arrays(manifest)]
    tables = [table.file for group in layout_of(manifest).groups for table in group.tables]
    return [ROOT, *arrays, *tables, label_file(manifest.fingerprint).key, DIGESTS, CANARIES]


def mend_skeleton(
    store: Store, recorded: Manifest, manifest: Manifest, samples: Samples, tables: Mapping[str, bytes]
) -> list[str]:
    """Write what is damaged, or of another manifest than the recorded one, again; returns the keys.

    The samples, and the bytes of the damaged tables by key, agree with the manifest. Its own file comes first: a run
    that is killed after it mends the others next.
    """
    damaged = [] if manifest == recorded else [ROOT]
    damaged += dict.fromkeys(problem.key for problem in skeleton_problems(store, manifest))
    whole = {**metadata_files(manifest), **samples.files(), **tables} if damaged else {}
    for key in damaged:
        (store.path / key).parent.mkdir(parents=True, exist_ok=True)
        store.write(key, whole[key])
    return damaged
