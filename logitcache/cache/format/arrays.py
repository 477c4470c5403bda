"""Arrays: how rows are cut into shards, and the keys of their bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from logitcache.store.shards import COMMITS, RECORD_BYTES, Shard, StoredShard, record_name

Storage = Annotated[
    Literal["hot", "packed"],
    Field(
        description="`hot`: uncompressed and read in place, row by row. `packed`: compressed with zstd and read a "
        "shard at a time, the rest of a view ahead of its use."
    ),
]

Order = Literal["sample", "component"]
"""How an inner chunk lies before it is compressed: row after row, or one number of all rows after another."""

ZSTD_LEVELS: Mapping[Order, int] = {"sample": 5, "component": 16}
"""How hard packed chunks are compressed. From 17 on zstd now and then takes numbers for text, which costs up to 5 %."""


Rows = dict[str, NDArray[Any]]
"""Rows of every array, by array name: of a shard, or gathered by key."""


class Floats(NamedTuple):
    """Floats in the items start..stop of a row of whole numbers."""

    start: int
    stop: int
    dtype: str


class Staged(NamedTuple):
    """The shards of the first `views` views that a growth in images makes longer than the rows `start` to `stop`.

    They lie beside the cache, under other keys, until all of the growth is committed.
    """

    views: int
    start: int
    stop: int

    def has(self, shard: Shard) -> bool:
        """Whether a shard is staged."""
        return shard.view < self.views and shard.start == self.start


STAGED = ".staged"
"""Suffix of the folders of staged shards and of their records."""

PAGE = 4096
INNER_BYTES = 128 << 10
MIN_PACKED_INNER_ROWS, MIN_COMPONENT_INNER_ROWS = 1024, 2048
"""Of zstd. What lies component by component is small numbers, which a thorough search for matches packs well."""

FLAT_KEYS = {"name": "default", "separator": "."}
"""Shards lie side by side in their array's folder."""

INDEX_ENTRY_BYTES, INDEX_CHECKSUM_BYTES = 16, 4


@dataclass(frozen=True)
class ArrayLayout:
    """One array of rows: [view, sample, *row_shape], sharded along samples only.

    `suffix` is its own name among the arrays of the group with the name `group`, in whose commit records it has the
    place `position`. With `per_shard` it has a row for each shard, of sums over its `images_per_row` images.
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
    floats: tuple[Floats, ...] = ()
    per_shard: bool = False
    images_per_row: int = 1
    group: str = ""
    position: int = 0
    staged: Staged | None = None

    def rows_of(self, shard: Shard) -> slice:
        """Return which rows of a view a shard has: one per image, or one for all of them."""
        return slice(shard.start // self.images_per_row, -(-shard.stop // self.images_per_row))

    @property
    def shards_per_view(self) -> int:
        """Shards of a view."""
        return -(-self.num_images // self.shard_rows)

    @property
    def padded(self) -> int:
        """Rows of a view that is padded to whole shards."""
        return self.shards_per_view * self.shard_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @cached_property
    def inner_rows(self) -> int:
        """Rows of an inner chunk: the largest divisor of a shard that keeps it near 128 KiB."""
        wanted = max(1, INNER_BYTES // self.row_bytes)
        if self.storage == "packed":
            wanted = max(wanted, MIN_PACKED_INNER_ROWS if self.order == "sample" else MIN_COMPONENT_INNER_ROWS)
        # From above, as a forged number of rows may have a hundred million smaller divisors to try.
        return next(rows for rows in range(min(wanted, self.shard_rows), 0, -1) if self.shard_rows % rows == 0)

    def is_finite(self, rows: NDArray[Any]) -> bool:
        """Whether no float of rows [n, *row_shape] is NaN or infinite."""
        parts = (rows[:, start:stop].view(dtype) for start, stop, dtype in self.floats)
        return is_finite(rows) and all(map(is_finite, parts))

    def hot_bytes(self, rows: int) -> int:
        """Stored bytes of a hot shard that holds `rows` rows: whole inner chunks, then the index."""
        inner_chunks = -(-rows // self.inner_rows)
        index = self.shard_rows // self.inner_rows * INDEX_ENTRY_BYTES + INDEX_CHECKSUM_BYTES
        return inner_chunks * self.inner_rows * self.row_bytes + index

    def stored_bounds(self, rows: int) -> tuple[int, int]:
        """Return the least and the most stored bytes of a shard of `rows` rows: zstd expands by a 256th at most."""
        full = self.hot_bytes(rows)
        if self.storage == "hot":
            return full, full
        chunks = -(-rows // self.inner_rows)
        return self.hot_bytes(0), full + full // 256 + 512 * chunks

    def file(self, shard: Shard) -> str:
        """Return the key of a shard's bytes in the store."""
        folder = f"{self.name}{self._stage_of(shard)}"
        return f"{folder}/c.{shard.view}.{self._place(shard)}" + ".0" * len(self.row_shape)

    def record_file(self, shard: Shard) -> str:
        """Return the key of the commit records of a shard in the store: its own, among those of its group's arrays."""
        return f"{self.group}{self._stage_of(shard)}{COMMITS}/{record_name(shard.view, self._place(shard))}"

    def _stage_of(self, shard: Shard) -> str:
        return STAGED if self.staged is not None and self.staged.has(shard) else ""

    def stored(self, shard: Shard, records: bytes) -> StoredShard:
        """Return a shard with its own record, among those of its group's arrays."""
        start, rows = self.position * RECORD_BYTES, self.rows_of(shard)
        float_bytes = (rows.stop - rows.start) * self.row_bytes if self.storage == "hot" else 0
        record = records[start : start + RECORD_BYTES]
        return StoredShard(self.file(shard), shard, record, self.row_bytes, float_bytes, self._are_finite)

    def _are_finite(self, rows: bytes) -> bool:
        return self.is_finite(np.frombuffer(rows, self.dtype).reshape(-1, *self.row_shape))

    def number_of(self, shard: Shard) -> int:
        """Return the number of a shard among those of all views."""
        return shard.view * self.shards_per_view + self._place(shard)

    def _place(self, shard: Shard) -> int:
        return shard.start // (self.shard_rows * self.images_per_row)

    def zarr_options(self) -> dict[str, Any]:
        """Return the arguments of zarr.create_array."""
        tail = self.row_shape
        packed = [{"name": "zstd", "configuration": {"level": ZSTD_LEVELS[self.order], "checksum": True}}]
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
            "dimension_names": ("view", "shard" if self.per_shard else "sample", *self.dims),
            "chunk_key_encoding": FLAT_KEYS,
            "config": {"write_empty_chunks": True},
        }


def is_finite(values: NDArray[Any]) -> bool:
    """Whether no float is NaN or infinite: compared as integers, at ten times the speed of `isfinite` on float16."""
    if not values.size or values.dtype.kind != "f":
        return True
    bits = 8 * values.dtype.itemsize
    exponent = _EXPONENTS[bits]
    positive, negative = values.view(f"<i{bits // 8}").max(), values.view(f"<u{bits // 8}").max()
    return bool(positive < exponent and negative < exponent | 1 << (bits - 1))


_EXPONENTS = {16: 0x7C00, 32: 0x7F80_0000, 64: 0x7FF0 << 48}
"""The bits of the exponent of a float, all of which NaN and infinity have."""


@dataclass(frozen=True)
class TableLayout:
    """One array beside the rows, a single chunk without compression: its file is its values."""

    name: str
    suffix: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sha256: str

    @property
    def file(self) -> str:
        """Key of its bytes in the store."""
        return f"{self.name}/c" + "/0" * len(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ArrayGroup:
    """Arrays that are written and committed together: one target of one teacher, or what is recorded of the views."""

    name: str
    arrays: tuple[ArrayLayout, ...]
    tables: tuple[TableLayout, ...] = ()
    teacher: str = ""
    target: str = ""

    @cached_property
    def rows(self) -> tuple[ArrayLayout, ...]:
        """The arrays that hold rows."""
        return tuple(array for array in self.arrays if not array.per_shard)

    @property
    def errors(self) -> ArrayLayout | None:
        """The array of the errors of its rows, if they are recorded."""
        return next((array for array in self.arrays if array.per_shard), None)

    @property
    def commits(self) -> str:
        """Name of the array of commit records."""
        return f"{self.name}{COMMITS}"

    @property
    def staged(self) -> Staged | None:
        """The shards that are staged beside the cache."""
        return self.arrays[0].staged

    @property
    def staged_commits(self) -> str:
        """Name of the folder of the commit records of staged shards."""
        return f"{self.name}{STAGED}{COMMITS}"

    @property
    def staged_folders(self) -> tuple[str, ...]:
        """The folders of staged shards and their commit records, if any are staged."""
        names = (self.staged_commits, *(f"{array.name}{STAGED}" for array in self.arrays))
        return () if self.staged is None else names

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of shards and of commit records."""
        return (self.commits, *(array.name for array in self.arrays), *self.staged_folders)

    def with_staged(self, staged: Staged | None) -> "ArrayGroup":
        """Return the same arrays with these shards staged; all in their places if None."""
        return replace(self, arrays=tuple(replace(array, staged=staged) for array in self.arrays))

    def record_file(self, shard: Shard) -> str:
        """Return the key of a shard's commit records in the store, one of each array in their order."""
        return self.arrays[0].record_file(shard)
