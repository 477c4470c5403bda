"""Layout: which arrays a manifest implies, how they are cut into shards and where their bytes lie."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from logitcache.cache.encodings.base import RowArray, TableShape
from logitcache.cache.format.arrays import FLAT_KEYS, PAGE, ArrayGroup, ArrayLayout, Staged, Storage, TableLayout
from logitcache.cache.format.manifest import LOGITS, VIEWS, Manifest, TeacherEntry
from logitcache.cache.format.row_errors import NUM_STATISTICS
from logitcache.errors import CacheError, RecipeError
from logitcache.store.shards import RECORD_BYTES, Shard

SHARD_BYTES, MAX_BYTES = 32 << 20, 1 << 60
"""Bytes of the rows of the largest array in a shard, about; bytes that no array has."""

MOST_DECODED = 32 * SHARD_BYTES
"""Bytes of a packed shard, decoded, and of a table: far above what is chosen, and no more than a machine has."""
CHECKSUMS, PARAMETERS = "crc32", "parameters"
"""What may be recorded of the views themselves."""


@dataclass(frozen=True)
class Layout:
    """All of a cache's arrays and shards: those of its teachers' targets, and what is recorded of the views."""

    num_views: int
    num_images: int
    shard_rows: int
    targets: tuple[ArrayGroup, ...]
    views: ArrayGroup | None = None

    def of(self, teacher: str) -> tuple[ArrayGroup, ...]:
        """Return the groups of a teacher by its name."""
        return tuple(group for group in self.targets if group.teacher == teacher)

    @property
    def groups(self) -> tuple[ArrayGroup, ...]:
        """Everything that is committed by shard."""
        return self.targets if self.views is None else (*self.targets, self.views)

    @property
    def views_arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays of what is recorded of the views themselves."""
        return () if self.views is None else self.views.arrays

    @property
    def arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays of all groups."""
        return tuple(array for group in self.groups for array in group.arrays)

    @property
    def tables(self) -> tuple[TableLayout, ...]:
        """The tables of all groups."""
        return tuple(table for group in self.groups for table in group.tables)

    @property
    def shards_per_view(self) -> int:
        """Shards of one array in one view."""
        return -(-self.num_images // self.shard_rows)

    @property
    def num_shards(self) -> int:
        """Shards of one array."""
        return self.num_views * self.shards_per_view

    @property
    def staged(self) -> Staged | None:
        """The shards that are staged beside the cache, if it is growing in images."""
        return next((group.staged for group in self.groups), None)

    def is_staged(self, shard: Shard) -> bool:
        """Whether a shard is staged."""
        return self.staged is not None and self.staged.has(shard)

    def num_known(self, shard: Shard) -> int:
        """Return how many of the first rows of a shard the cache has already: those that a staged one begins with."""
        return self.staged.stop - self.staged.start if self.staged is not None and self.is_staged(shard) else 0

    def num_new(self, shards: Iterable[Shard]) -> int:
        """Count the rows of shards that the cache does not have already."""
        return sum(shard.stop - shard.start - self.num_known(shard) for shard in shards)

    def shard(self, view: int, number: int) -> Shard:
        """Return a view's shard by its number."""
        start = number * self.shard_rows
        return Shard(view, start, min(start + self.shard_rows, self.num_images))

    def shards(self) -> Iterator[Shard]:
        """Yield every shard, view by view."""
        for view in range(self.num_views):
            for number in range(self.shards_per_view):
                yield self.shard(view, number)

    def commit_options(self, group: ArrayGroup) -> dict[str, Any]:
        """Return the arguments of zarr.create_array for a group's commit records; an absent one is all zero."""
        records = (len(group.arrays), RECORD_BYTES)
        return {
            "name": group.commits,
            "shape": (self.num_views, self.shards_per_view, *records),
            "chunks": (1, 1, *records),
            "dtype": "uint8",
            "compressors": None,
            "fill_value": 0,
            "chunk_key_encoding": FLAT_KEYS,
            "dimension_names": ("view", "shard", f"{group.name}.array", "record"),
        }


def staged_between(recorded: Manifest, goal: Manifest) -> Staged | None:
    """Return the shards that are staged while a cache grows to `goal`: the last ones, if more images fill them."""
    start = recorded.num_images // recorded.shard_rows * recorded.shard_rows
    is_longer = start < recorded.num_images < goal.num_images
    return Staged(recorded.views.num_views, start, recorded.num_images) if is_longer else None


def layout_of(manifest: Manifest, staged: Staged | None = None) -> Layout:
    """Derive the layout from a manifest, of which some shards may be staged: the one place that knows it."""
    targets = tuple(
        _target_group(manifest, name, target) for name, entry in manifest.teachers.items() for target in entry.targets
    )
    size = manifest.views.num_views, manifest.num_images, manifest.shard_rows
    views = _views_group(manifest)
    if staged is not None:
        targets = tuple(group.with_staged(staged) for group in targets)
        views = None if views is None else views.with_staged(staged)
    return Layout(*size, targets, views)


def _target_group(manifest: Manifest, teacher: str, target: str) -> ArrayGroup:
    kept = kept_of(manifest.teachers[teacher], target)
    name = f"{teacher}.{target}"
    prefix = teacher if target == LOGITS else name
    arrays = [_array(manifest, name, row, kept.storage, prefix, place) for place, row in enumerate(kept.rows)]
    if kept.errors is not None:
        arrays.append(_errors_array(manifest, name, len(arrays), kept.errors))
    tables = tuple(
        TableLayout(f"{name}.{key}", key, table.shape, np.dtype(table.dtype).newbyteorder("<"), kept.digests[key])
        for key, table in kept.tables.items()
    )
    return ArrayGroup(name, tuple(arrays), tables, teacher, target)


class Kept(NamedTuple):
    """What a target takes: arrays of rows, and tables with their digests.

    errors: the axes of the statistics of the errors of rows before their own; None if they are not recorded.
    """

    rows: tuple[RowArray, ...]
    storage: Storage
    tables: Mapping[str, TableShape]
    digests: Mapping[str, str]
    errors: tuple[int, ...] | None


def kept_of(entry: TeacherEntry, target: str) -> Kept:
    """Return what a target takes; raise RecipeError if an entry contradicts itself."""
    if target == LOGITS:
        logits, stored, classes = entry.logits, entry.stored_logits, entry.num_classes
        if logits is None or stored is None or classes is None:
            raise RecipeError("its logits are kept in no form")
        form = stored.form
        for name, width in form.needs.items():
            feature = entry.stored_features.get(name)
            if feature is None or feature.shape != (width,) or not feature.form.is_plain:
                raise RecipeError(f"its logits need the feature {name!r} as vectors of {width} numbers")
        shapes = form.table_shapes(classes)
        kept = Kept(form.arrays(classes), form.storage, shapes, stored.tables, _error_axes(entry))
    else:
        asked, found = entry.features[target], entry.stored_features.get(target)
        if found is None:
            raise RecipeError(f"its feature {target!r} is kept in no form")
        shapes = found.form.table_shapes(found.shape)
        rows = found.form.arrays(asked.kind, found.shape)
        kept = Kept(rows, found.form.storage, shapes, found.tables, () if asked.measured else None)
    if kept.tables.keys() != kept.digests.keys():
        raise RecipeError(f"its {target} have the tables {sorted(kept.digests)}, not {sorted(kept.tables)}")
    return kept


def _error_axes(entry: TeacherEntry) -> tuple[int, ...] | None:
    """Return the axes of the errors of logits: that of temperatures, which the first release did not have."""
    assert entry.stored_logits is not None
    if entry.stored_logits.error_temperatures is None:
        return None if entry.error_temperatures is None else ()
    return (len(entry.stored_logits.error_temperatures),) if entry.stored_logits.error_temperatures else None


def _errors_array(manifest: Manifest, stem: str, position: int, axes: tuple[int, ...]) -> ArrayLayout:
    """Lay out the statistics of the errors of rows: one row for each shard."""
    return ArrayLayout(
        name=f"{stem}.errors",
        suffix="errors",
        row_shape=(*axes, NUM_STATISTICS),
        dtype=np.dtype("<f8"),
        dims=("temperature", "statistic")[-1 - len(axes) :],
        num_views=manifest.views.num_views,
        num_images=-(-manifest.num_images // manifest.shard_rows),
        shard_rows=1,
        storage="packed",
        per_shard=True,
        images_per_row=manifest.shard_rows,
        group=stem,
        position=position,
    )


def _views_group(manifest: Manifest) -> ArrayGroup | None:
    """Lay out the arrays that are recorded of every view; None if there are none.

    Packed: parameters of crop and flip take 7 bytes a row in place of 40, and shards of few bytes a row need not fill
    whole pages. Readers keep whole views decoded.
    """
    rows = []
    if manifest.row_checksums:
        rows.append(RowArray(CHECKSUMS, (), "uint32", ()))
    if manifest.parameters:
        rows.append(RowArray(PARAMETERS, (len(manifest.parameters),), "int64", ("parameter",)))
    arrays = tuple(_array(manifest, VIEWS, row, "packed", VIEWS, place) for place, row in enumerate(rows))
    return ArrayGroup(VIEWS, arrays) if arrays else None


def _array(manifest: Manifest, stem: str, row: RowArray, storage: Storage, prefix: str, position: int) -> ArrayLayout:
    return ArrayLayout(
        name=f"{stem}.{row.suffix}" if row.suffix else stem,
        suffix=row.suffix,
        row_shape=row.shape,
        dtype=np.dtype(row.dtype).newbyteorder("<"),
        dims=tuple(f"{prefix}.{dim}" for dim in row.dims),
        num_views=manifest.views.num_views,
        num_images=manifest.num_images,
        shard_rows=manifest.shard_rows,
        storage=storage,
        order=row.order,
        floats=row.floats,
        group=stem,
        position=position,
    )


def require_possible(manifest: Manifest, where: str) -> None:
    """Raise CacheError for a manifest that no precompute can have written, before anything relies on its sizes."""
    try:
        reason = next(_impossible(manifest), None)
    except RecipeError as error:
        reason = str(error)
    if reason is not None:
        raise CacheError(f"{where}: the manifest is not valid: {reason}. Fix: remove it, and precompute again")


def _impossible(manifest: Manifest) -> Iterator[str]:
    """Yield what no cache can have; raise RecipeError for an entry that contradicts itself."""
    layout = layout_of(manifest)
    for array in layout.arrays:
        if array.storage == "hot" and array.shard_rows * array.row_bytes % PAGE:
            yield f"shards of {array.name} do not fill whole pages"
    sizes = [array.num_views * (array.num_images + array.shard_rows) * array.row_bytes for array in layout.arrays]
    pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
    largest = max(0, *sizes, *(table.num_bytes for table in layout.tables), pixels)
    if largest > MAX_BYTES:
        yield f"{largest} bytes are more than any disk holds"
    for array in (array for group in layout.targets for array in group.arrays if array.storage == "packed"):
        size = min(array.shard_rows, array.num_images) * array.row_bytes
        if size > MOST_DECODED:
            yield f"a shard of {array.name} decodes to {size} bytes, {MOST_DECODED} at most"
    for table in layout.tables:
        if table.num_bytes > MOST_DECODED:
            yield f"the table {table.name} has {table.num_bytes} bytes, {MOST_DECODED} at most"
