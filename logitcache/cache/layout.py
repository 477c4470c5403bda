"""Layout: which arrays a manifest implies, how they are cut into shards and where their bytes lie."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from logitcache.cache.encodings.base import Order, RowArray, Storage
from logitcache.cache.manifest import VIEWS, Manifest, TeacherEntry
from logitcache.errors import CacheError, RecipeError

PAGE = 4096
SHARD_BYTES = 32 << 20
MAX_SHARD_ROWS = 65_536
INNER_BYTES = 128 << 10
MIN_PACKED_INNER_ROWS = 1024
MAX_BYTES = 1 << 60
RECORD_BYTES = 40
"""A commit record: the stored size of a shard's bytes (uint64, little endian), then their seal."""

FLAT_KEYS = {"name": "default", "separator": "."}
"""Shards lie side by side in their array's folder."""

INDEX_ENTRY_BYTES, INDEX_CHECKSUM_BYTES = 16, 4
CHECKSUMS, PARAMETERS = "crc32", "parameters"
"""What may be recorded of the views themselves."""


def seal(digest: bytes, key: str) -> bytes:
    """Return the sha256 of a shard's own sha256 and its key: moved elsewhere, even with its record, it does not fit."""
    return hashlib.sha256(digest + key.encode()).digest()


class Shard(NamedTuple):
    """The unit of work, of writing, of committing and of resuming: rows start..stop of a view."""

    view: int
    start: int
    stop: int


@dataclass(frozen=True)
class ArrayLayout:
    """One array of rows: [view, sample, *row_shape], sharded along samples only.

    `suffix` is its own name among the arrays of its group.
    """

    name: str
    suffix: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    num_views: int
    num_images: int
    shard_rows: int
    storage: Storage
    order: Order = "sample"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @cached_property
    def inner_rows(self) -> int:
        """Rows of an inner chunk: the largest divisor of a shard that keeps it near 128 KiB."""
        wanted = max(1, INNER_BYTES // self.row_bytes)
        if self.storage == "packed":
            wanted = max(wanted, MIN_PACKED_INNER_ROWS)
        return max(rows for rows in range(1, min(wanted, self.shard_rows) + 1) if self.shard_rows % rows == 0)

    def hot_bytes(self, rows: int) -> int:
        """Stored bytes of a hot shard that holds `rows` rows: whole inner chunks, then the index."""
        inner_chunks = -(-rows // self.inner_rows)
        index = self.shard_rows // self.inner_rows * INDEX_ENTRY_BYTES + INDEX_CHECKSUM_BYTES
        return inner_chunks * self.inner_rows * self.row_bytes + index

    def file(self, shard: Shard) -> str:
        """Return the key of a shard's bytes in the store."""
        return f"{self.name}/c.{shard.view}.{shard.start // self.shard_rows}" + ".0" * len(self.row_shape)

    def zarr_options(self) -> dict[str, Any]:
        """Return the arguments of zarr.create_array."""
        tail = self.row_shape
        packed = [{"name": "zstd", "configuration": {"level": 5, "checksum": True}}]
        by_component = {"name": "transpose", "configuration": {"order": (0, *range(2, 2 + len(tail)), 1)}}
        transposed = self.storage == "packed" and self.order == "component"
        return {
            "name": self.name,
            "shape": (self.num_views, self.num_images, *tail),
            "shards": (1, self.shard_rows, *tail),
            "chunks": (1, self.inner_rows, *tail),
            "dtype": self.dtype,
            "filters": [by_component] if transposed else None,
            "compressors": packed if self.storage == "packed" else None,
            "fill_value": float("nan") if self.dtype.kind == "f" else 0,
            "dimension_names": ("view", "sample", *self.dims),
            "chunk_key_encoding": FLAT_KEYS,
            "config": {"write_empty_chunks": True},
        }


E = TypeVar("E")


@dataclass(frozen=True)
class ArrayGroup(Generic[E]):
    """Arrays that are written and committed together, and what the manifest says of them."""

    name: str
    entry: E
    arrays: tuple[ArrayLayout, ...]

    @property
    def commits(self) -> str:
        """Name of the array of commit records."""
        return f"{self.name}.commits"

    def record_file(self, shard: Shard) -> str:
        """Return the key of a shard's commit record in the store."""
        return f"{self.commits}/c.{shard.view}.{shard.start // self.arrays[0].shard_rows}.0.0"


TeacherLayout = ArrayGroup[TeacherEntry]
"""The arrays of one teacher."""


@dataclass(frozen=True)
class Layout:
    """All of a cache's arrays and shards: those of its teachers, and what is recorded of the views themselves."""

    num_views: int
    num_images: int
    shard_rows: int
    teachers: tuple[TeacherLayout, ...]
    views: ArrayGroup[None] | None = None

    def teacher(self, name: str) -> TeacherLayout:
        """Return the arrays of a teacher by its name."""
        return next(teacher for teacher in self.teachers if teacher.name == name)

    @property
    def groups(self) -> tuple[ArrayGroup[Any], ...]:
        """Everything that is committed by shard."""
        return self.teachers if self.views is None else (*self.teachers, self.views)

    @property
    def views_arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays of what is recorded of the views themselves."""
        return () if self.views is None else self.views.arrays

    @property
    def arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays of all groups."""
        return tuple(array for group in self.groups for array in group.arrays)

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

    def commit_options(self, group: ArrayGroup[Any]) -> dict[str, Any]:
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
    teachers = tuple(_teacher_group(manifest, name, entry) for name, entry in manifest.teachers.items())
    size = manifest.views.num_views, manifest.num_images, manifest.shard_rows
    return Layout(*size, teachers, _views_group(manifest))


def _teacher_group(manifest: Manifest, name: str, entry: TeacherEntry) -> TeacherLayout:
    rows, stem = entry.logits.arrays(entry.num_classes), f"{name}.logits"
    return TeacherLayout(name, entry, tuple(_array(manifest, stem, row, entry.logits.storage) for row in rows))


def _views_group(manifest: Manifest) -> ArrayGroup[None] | None:
    """Lay out what is recorded of every view; None where nothing is.

    Packed: parameters of crop and flip take 7 bytes a row in place of 40, and shards of few bytes a row need not fill
    whole pages. Whoever reads them keeps whole views decoded.
    """
    rows = []
    if manifest.row_checksums:
        rows.append(RowArray(CHECKSUMS, (), "uint32", ()))
    if manifest.parameters:
        rows.append(RowArray(PARAMETERS, (len(manifest.parameters),), "int64", ("parameter",)))
    arrays = tuple(_array(manifest, VIEWS, row, "packed") for row in rows)
    return ArrayGroup(VIEWS, None, arrays) if arrays else None


def _array(manifest: Manifest, stem: str, row: RowArray, storage: Storage) -> ArrayLayout:
    return ArrayLayout(
        name=f"{stem}.{row.suffix}" if row.suffix else stem,
        suffix=row.suffix,
        row_shape=row.shape,
        dtype=np.dtype(row.dtype).newbyteorder("<"),
        dims=tuple(f"{stem.split('.')[0]}.{dim}" for dim in row.dims),
        num_views=manifest.views.num_views,
        num_images=manifest.num_images,
        shard_rows=manifest.shard_rows,
        storage=storage,
        order=row.order,
    )


def require_possible(manifest: Manifest, where: str) -> None:
    """Raise CacheError for a manifest that no precompute can have written, before anything relies on its sizes."""
    try:
        arrays = layout_of(manifest).arrays
        hot = [array for array in arrays if array.storage == "hot"]
        wrong = next((array for array in hot if array.shard_rows * array.row_bytes % PAGE), None)
        reason = "" if wrong is None else f"shards of {wrong.name} do not fill whole pages"
    except RecipeError as error:
        reason = str(error)
    else:
        sizes = [array.num_views * (array.num_images + array.shard_rows) * array.row_bytes for array in arrays]
        pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
        if max(*sizes, pixels) > MAX_BYTES:
            reason = f"{max(*sizes, pixels)} bytes are more than any disk holds"
    if reason:
        raise CacheError(f"{where}: the manifest is not valid: {reason}. Fix: remove it, and precompute again")


def choose_shard_rows(entries: Sequence[TeacherEntry], num_images: int, asked: int | None) -> int:
    """Choose the rows of a shard: a power of two, pages full for every hot array, and the largest array near 32 MiB.

    Shard files of a hot array map one after another into one address range only if each fills whole pages.
    """
    sizes = [
        (entry.logits.storage, row.num_bytes) for entry in entries for row in entry.logits.arrays(entry.num_classes)
    ]
    largest = max(size for _, size in sizes)
    step = max((PAGE // math.gcd(PAGE, size) for storage, size in sizes if storage == "hot"), default=1)
    if asked is not None:
        if asked % step:
            near = max(step, round(asked / step) * step)
            raise RecipeError(
                f"shard_rows = {asked}: rows here fill whole pages of {PAGE} bytes only in multiples of {step}. "
                f"Fix: shard_rows: {near}, or leave it out"
            )
        return asked
    rows = MAX_SHARD_ROWS
    while rows > step and (rows * largest > SHARD_BYTES or rows // 2 >= num_images):
        rows //= 2
    return rows
