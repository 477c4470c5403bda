"""Layout: which arrays a manifest implies, how they are cut into shards and where their bytes lie."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from logitcache.cache.encodings.base import RowArray, TableShape
from logitcache.cache.format.manifest import LOGITS, VIEWS, Manifest, StoredFeature, StoredLogits, TeacherEntry
from logitcache.cache.format.row_errors import NUM_STATISTICS
from logitcache.errors import CacheError, RecipeError
from logitcache.runtime.console import logger
from logitcache.store.arrays import FLAT_KEYS, PAGE, RECORD_BYTES, ArrayGroup, ArrayLayout, Shard, Storage, TableLayout

S = TypeVar("S", StoredLogits, StoredFeature)

SHARD_BYTES = 32 << 20
MAX_SHARD_ROWS, FEWEST_SHARDS, MOST_SHARD_ROWS = 65_536, 64, 1 << 20
"""Rows of a shard, unless there are so many images that a view has at least so many larger ones; and then."""
SHARDS_PER_VIEW, FEWEST_SHARD_ROWS = 16, 64
"""A stop drops the shard in progress: a view has at least so many, of at least so many rows, which fill a batch."""
MAX_BYTES = 1 << 60
MOST_DECODED = 32 * SHARD_BYTES
"""Bytes of a packed shard, decoded: far above what is chosen, and no more than a machine has."""
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


def layout_of(manifest: Manifest) -> Layout:
    """Derive the layout from a manifest: the one place that knows it."""
    targets = tuple(
        _target_group(manifest, name, target) for name, entry in manifest.teachers.items() for target in entry.targets
    )
    size = manifest.views.num_views, manifest.num_images, manifest.shard_rows
    return Layout(*size, targets, _views_group(manifest))


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
    """Return what a target takes; raise RecipeError where an entry contradicts itself."""
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
    """Lay out what is recorded of every view; None where nothing is.

    Packed: parameters of crop and flip take 7 bytes a row in place of 40, and shards of few bytes a row need not fill
    whole pages. Whoever reads them keeps whole views decoded.
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
        layout = layout_of(manifest)
        arrays = layout.arrays
        hot = [array for array in arrays if array.storage == "hot"]
        wrong = next((array for array in hot if array.shard_rows * array.row_bytes % PAGE), None)
        reason = "" if wrong is None else f"shards of {wrong.name} do not fill whole pages"
    except RecipeError as error:
        reason = str(error)
    else:
        sizes = [array.num_views * (array.num_images + array.shard_rows) * array.row_bytes for array in arrays]
        sizes += [table.num_bytes for table in layout.tables]
        pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
        if max(*sizes, pixels) > MAX_BYTES:
            reason = f"{max(*sizes, pixels)} bytes are more than any disk holds"
        else:
            reason = _too_large(layout)
    if reason:
        raise CacheError(f"{where}: the manifest is not valid: {reason}. Fix: remove it, and precompute again")


def _too_large(layout: Layout) -> str:
    for array in (array for group in layout.targets for array in group.arrays if array.storage == "packed"):
        size = min(array.shard_rows, array.num_images) * array.row_bytes
        if size > MOST_DECODED:
            return f"a shard of {array.name} decodes to {size} bytes, {MOST_DECODED} at most"
    return ""


def choose_shard_rows(entries: Sequence[TeacherEntry], num_images: int, asked: int | None) -> int:
    """Return the rows of a shard that are asked for, or choose them.

    A power of two, pages full for every hot array, and the largest array near 32 MiB.

    Shard files of a hot array map one after another into one address range only if each fills whole pages. From 8.4
    million images on shards grow with their number, so that a view has 64 to 128 of them as far as 32 MiB allow: enough
    to be computed by many at a time, and few enough for one folder to hold those of all views. Of fewer images than a
    million a view has 16 to 31, as far as pages and `FEWEST_SHARD_ROWS` allow: what is in progress when a run stops is
    lost.
    """
    if asked is not None:
        return asked
    kept = [kept_of(entry, target) for entry in entries for target in entry.targets]
    sizes = [(one.storage, row.num_bytes) for one in kept for row in one.rows]
    largest = max(size for _, size in sizes)
    step = max((PAGE // math.gcd(PAGE, size) for storage, size in sizes if storage == "hot"), default=1)
    rows = MAX_SHARD_ROWS
    while rows < MOST_SHARD_ROWS and 2 * rows * FEWEST_SHARDS <= num_images:
        rows *= 2
    most = max(FEWEST_SHARD_ROWS, num_images // SHARDS_PER_VIEW)
    while rows > step and (rows * largest > SHARD_BYTES or rows > most or rows // 2 >= num_images):
        rows //= 2
    return rows


def fit_to_pages(entries: Mapping[str, TeacherEntry], shard_rows: int) -> dict[str, TeacherEntry]:
    """Store packed each hot target that would not fill whole pages with shards of so many rows.

    Raises RecipeError if a packed shard would take too much memory to decode.
    """
    fitted = {name: _fit_to_pages(name, entry, shard_rows) for name, entry in entries.items()}
    for name, entry in fitted.items():
        for target in entry.targets:
            kept = kept_of(entry, target)
            # A head keeps no row of its own.
            most = MOST_DECODED // max((row.num_bytes for row in kept.rows), default=1)
            if kept.storage == "packed" and shard_rows > most:
                raise RecipeError(
                    f"shard_rows: {shard_rows} rows of {name}.{target} take more than {MOST_DECODED} bytes to decode. "
                    f"Fix: shard_rows: {most} at most"
                )
    return fitted


def _fit_to_pages(name: str, entry: TeacherEntry, shard_rows: int) -> TeacherEntry:
    wrong = [target for target in entry.targets if not _fills_pages(kept_of(entry, target), shard_rows)]
    for target in wrong:
        logger.info(
            f"teachers.{name}: {target} is stored packed, as shards of {shard_rows} rows do not fill whole pages"
        )
    features = {
        target: _packed(stored) if target in wrong else stored for target, stored in entry.stored_features.items()
    }
    logits = _packed(entry.stored_logits) if entry.stored_logits and LOGITS in wrong else entry.stored_logits
    return entry.model_copy(update={"stored_features": features, "stored_logits": logits})


def _fills_pages(kept: Kept, shard_rows: int) -> bool:
    return kept.storage != "hot" or all(shard_rows * row.num_bytes % PAGE == 0 for row in kept.rows)


def _packed(stored: S) -> S:
    return stored.model_copy(update={"form": stored.form.model_copy(update={"storage": "packed"})})
