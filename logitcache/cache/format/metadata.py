"""The skeleton of a cache: all files but the shards and their records. It is written before a teacher answers.

zarr-python is imported by the functions that write or compare metadata: opening a cache that this machine has compared
before needs none of it.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayGroup, is_finite
from logitcache.cache.format.growth import outgrown_to
from logitcache.cache.format.layout import layout_of
from logitcache.cache.format.manifest import Manifest, parse_manifest
from logitcache.cache.format.manifest_diff import extends
from logitcache.cache.format.root import GROWING, ROOT, read_manifest
from logitcache.cache.format.samples import (
    CANARIES,
    DIGESTS,
    IDS,
    SIZES,
    Samples,
    label_file,
    read_digests,
    read_ids,
    read_labels,
    read_sized,
    read_sizes,
    require_canaries,
    require_first,
    sample_sizes,
)
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import MAX_METADATA_BYTES, parse_json
from logitcache.store.shards import NOT_FINITE

MAX_ARRAY_BYTES = 1 << 20
"""Most bytes of an array's metadata."""

_NO_METADATA = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, NotImplementedError)
"""Raised by JSON and zarr-python for what is not the metadata of a group or an array."""

_FIXED = ("label", "digest", "canary", "id", "size")
"""Arrays that are the same in a cache that grew in views."""


class Problem(NamedTuple):
    """A file that is not what the manifest implies."""

    key: str
    text: str


def read_tables(store: Store, group: ArrayGroup) -> dict[str, NDArray[Any]]:
    """Read the tables of a group by their own names; raise CacheError if they are not those of the manifest."""
    tables = {}
    for table in group.tables:
        data = read_sized(store, table.file, table.num_bytes, table.sha256)
        tables[table.suffix] = np.frombuffer(data, table.dtype).reshape(table.shape)
        if not is_finite(tables[table.suffix]):
            raise CacheError(f"{store}/{table.file}: {NOT_FINITE}")
    return tables


def table_bytes(table: NDArray[Any]) -> bytes:
    """Return the stored bytes of a table, little endian in C order."""
    return np.ascontiguousarray(table).astype(table.dtype.newbyteorder("<")).tobytes()


@dataclass(frozen=True)
class _Described:
    """A manifest, equal to others of the same stored form."""

    stored: str
    manifest: Manifest = field(compare=False)


def metadata_files(manifest: Manifest) -> dict[str, bytes]:
    """Return the metadata of a cache as this zarr-python writes it, by key."""
    return dict(_metadata_files(_Described(json.dumps(manifest.attributes()), manifest)))


@lru_cache(maxsize=8)  # zarr-python takes milliseconds for each array, and a process opens a cache more than once
def _metadata_files(described: _Described) -> Mapping[str, bytes]:
    import zarr
    from zarr.errors import ZarrUserWarning
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    store = MemoryStore(store_dict=files)
    group = zarr.create_group(store)
    for options in _array_options(described.manifest):
        group.create_array(**options)
    with warnings.catch_warnings():
        # Not yet in the specification, but every reader either uses it or passes over it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(store)
    found = {key: value.to_bytes() for key, value in files.items()}
    # zarr-python copies the attributes of a group with each array, and a manifest may be megabytes.
    root = json.loads(found[ROOT]) | {"attributes": {"logitcache": described.manifest.attributes()}}
    return found | {ROOT: json.dumps(root, indent=zarr.config.get("json_indent")).encode()}


def _array_options(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the arguments of zarr.create_array for every array of a cache."""
    count, pixels = manifest.num_images, (len(manifest.canaries), *manifest.image_shape)
    _, shape, dtype = label_file(manifest.fingerprint)
    yield _single_chunk("label", shape, dtype.str, -1, ("sample", "class")[: len(shape)])
    yield _single_chunk("digest", (count,), "<u8", 0, ("sample",))
    yield _single_chunk("canary", pixels, "uint8", 0, ("canary", "channel", "height", "width"))
    if manifest.appended is not None:
        yield _single_chunk("id", (manifest.appended.id_bytes,), "uint8", 0, ("byte",))
        yield _single_chunk("size", (count, 2), "<i8", 0, ("sample", "side"))
    layout = layout_of(manifest)
    for group in layout.groups:
        for table in group.tables:
            dims = tuple(f"{table.name}.{axis}" for axis in range(len(table.shape)))
            yield _single_chunk(table.name, table.shape, table.dtype.str, 0, dims)
        for array in group.arrays:
            yield array.zarr_options()
        yield layout.commit_options(group)


def _single_chunk(name: str, shape: tuple[int, ...], dtype: str, fill: int, dims: tuple[str, ...]) -> dict[str, Any]:
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


def skeleton_limits(manifest: Manifest) -> dict[str, int]:
    """Return the most bytes of each file of the skeleton, by key, the root first."""
    arrays = {f"{options['name']}/{ROOT}": MAX_ARRAY_BYTES for options in _array_options(manifest)}
    tables = {table.file: table.num_bytes for table in layout_of(manifest).tables}
    return {ROOT: MAX_METADATA_BYTES, **arrays, **tables, **sample_sizes(manifest)}


def skeleton_problems(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """Compare metadata, tables, labels, image digests and canary pixels with the manifest."""
    wanted, recorded = metadata_files(manifest), manifest.fingerprint
    # Another release of zarr may write the same in other words.
    parse = _as_json if manifest.versions.get("zarr") == version("zarr") else _as_zarr
    for options in _array_options(manifest):
        key = f"{options['name']}/{ROOT}"
        yield from _compare(key, partial(_require_array, store, manifest, key, wanted[key], parse))
    yield from _compare(ROOT, partial(_require_root, store, manifest, wanted[ROOT], parse))
    yield from table_problems(store, layout_of(manifest).groups)
    checks: dict[str, Callable[[], object]] = {
        label_file(recorded).key: partial(read_labels, store, manifest, recorded.labels),
        DIGESTS: partial(read_digests, store, manifest, recorded.content),
        CANARIES: partial(require_canaries, store, manifest),
    }
    if manifest.appended is not None:
        checks[IDS] = partial(read_ids, store, manifest, recorded.ids)
        checks[SIZES] = partial(read_sizes, store, manifest, recorded.sizes)
    problems = [problem for key, check in checks.items() for problem in _compare(key, check)]
    yield from problems
    if manifest.appended is not None and not problems:
        yield from _compare(ROOT, partial(require_first, store, manifest))


def table_problems(store: Store, groups: Iterable[ArrayGroup]) -> Iterator[Problem]:
    """Compare tables with the manifest."""
    for group in groups:
        for table in group.tables:
            yield from _compare(table.file, partial(read_tables, store, replace(group, tables=(table,))))


def _compare(key: str, check: Callable[[], object]) -> list[Problem]:
    """Return the problem of a file for which a check raises CacheError; other errors are ours."""
    try:
        check()
    except CacheError as error:
        return [Problem(key, str(error))]
    return []


def _require_array(
    store: Store, manifest: Manifest, key: str, wanted: bytes, parse: Callable[[bytes, str], Any]
) -> None:
    found, implied = _parsed(store, key, parse), parse(wanted, key)
    if found == implied or (key.split("/")[0] not in _FIXED and _is_grown(store, found, implied)):
        return
    goals = (metadata_files(goal) for goal in outgrown_to(store, *manifest.extent))
    if not any(key in files and found == parse(files[key], key) for files in goals):
        raise CacheError(f"{store}/{key} does not describe what the manifest implies")


def _require_root(store: Store, manifest: Manifest, wanted: bytes, parse: Callable[[bytes, str], Any]) -> None:
    """Compare the root with a manifest; one that has grown meanwhile agrees with the manifest that it has now."""
    found = _parsed(store, ROOT, parse)
    now = parse_manifest(found.get("attributes"), str(store))
    implied = parse(wanted if now == manifest else metadata_files(now)[ROOT], ROOT)
    without_manifest = {"attributes": None}  # which has its own digest
    if found | without_manifest != implied | without_manifest or not extends(now, manifest):
        raise CacheError(f"{store}/{ROOT} does not describe what the manifest implies")


def _parsed(store: Store, key: str, parse: Callable[[bytes, str], Any]) -> Any:
    """Read and parse metadata; raise CacheError if they are missing or damaged."""
    try:
        return parse(store.read(key), key)
    except FileNotFoundError as error:
        raise CacheError(f"{store}/{key} cannot be read: it is missing") from error
    except CacheError:
        raise
    except _NO_METADATA as error:
        raise CacheError(f"{store}/{key} is damaged: {type(error).__name__}: {error}") from error


def _is_grown(store: Store, found: Any, implied: Any) -> bool:
    """Whether an array's metadata differ from what is implied by more views alone, as those of a cache that grows do.

    All of these views are committed by then, and the root follows. It is read last: what grew earlier is in it.
    """
    shape = found.get("shape") if isinstance(found, dict) else None
    if not isinstance(shape, list) or {**found, "shape": [*implied["shape"][:1], *shape[1:]]} != implied:
        return False
    try:
        growing = int(parse_json(store.read(GROWING))["num_views"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not growing, or damaged, which `read_growth` reports
        growing = 0
    views, most = shape[0], max(growing, read_manifest(store).views.num_views)
    return isinstance(views, int) and implied["shape"][0] < views <= most


def _as_json(stored: bytes, key: str) -> Any:
    found = parse_json(stored)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _as_zarr(stored: bytes, key: str) -> Any:
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    store = MemoryStore(store_dict={ROOT: cpu.Buffer.from_bytes(stored)})
    if key == ROOT:
        found = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=True).metadata.to_dict()
    else:
        found = dict(zarr.open_array(store, mode="r", zarr_format=3).metadata.to_dict())
    return json.loads(json.dumps(found))


def repair_skeleton(
    store: Store, recorded: Manifest, manifest: Manifest, samples: Samples, tables: Mapping[str, bytes]
) -> list[str]:
    """Write what is damaged, or of another manifest than the recorded one, again; returns the keys.

    The samples, and the bytes of the damaged tables by key, agree with the manifest. Its own file comes first: a run
    that is killed after it repairs the others next.
    """
    damaged = [] if manifest == recorded else [ROOT]
    damaged += dict.fromkeys(problem.key for problem in skeleton_problems(store, manifest))
    whole = {**metadata_files(manifest), **samples.files(), **tables} if damaged else {}
    for key in damaged:
        (store.path / key).parent.mkdir(parents=True, exist_ok=True)
        store.write(key, whole[key])
    return damaged
