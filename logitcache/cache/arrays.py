"""Arrays and shards: how rows are cut into shards, and where their bytes lie."""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from logitcache.cache.encodings.base import Order, Storage

PAGE = 4096
INNER_BYTES = 128 << 10
MIN_PACKED_INNER_ROWS, MIN_COMPONENT_INNER_ROWS = 1024, 2048
LEVEL, COMPONENT_LEVEL = 5, 19
"""Of zstd. What lies component by component is small numbers, which a thorough search for matches packs well."""

RECORD_BYTES = 40
"""A commit record: the stored size of a shard's bytes (uint64, little endian), then their seal."""

RECORD = re.compile(r"c\.(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})\.0\.0")
"""What the file of a commit record is called: after the view and the number of the shard."""

COMMITS = ".commits"
"""How the names end of the arrays of commit records."""

FLAT_KEYS = {"name": "default", "separator": "."}
"""Shards lie side by side in their array's folder."""

INDEX_ENTRY_BYTES, INDEX_CHECKSUM_BYTES = 16, 4


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
    per_shard: bool = False
    images_per_row: int = 1
    group: str = ""
    position: int = 0

    def rows_of(self, shard: Shard) -> slice:
        """Return which rows of a view a shard has: one per image, or one for all of them."""
        return slice(shard.start // self.images_per_row, -(-shard.stop // self.images_per_row))

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
        small = [rows for rows in range(1, math.isqrt(self.shard_rows) + 1) if self.shard_rows % rows == 0]
        return max(rows for one in small for rows in (one, self.shard_rows // one) if rows <= wanted)

    def hot_bytes(self, rows: int) -> int:
        """Stored bytes of a hot shard that holds `rows` rows: whole inner chunks, then the index."""
        inner_chunks = -(-rows // self.inner_rows)
        index = self.shard_rows // self.inner_rows * INDEX_ENTRY_BYTES + INDEX_CHECKSUM_BYTES
        return inner_chunks * self.inner_rows * self.row_bytes + index

    def file(self, shard: Shard) -> str:
        """Return the key of a shard's bytes in the store."""
        return f"{self.name}/c.{shard.view}.{self._number(shard)}" + ".0" * len(self.row_shape)

    def record_file(self, shard: Shard) -> str:
        """Return the key of the commit record of a shard in the store; it holds those of the other arrays too."""
        return f"{self.group}{COMMITS}/c.{shard.view}.{self._number(shard)}.0.0"

    def _number(self, shard: Shard) -> int:
        return shard.start // (self.shard_rows * self.images_per_row)

    def zarr_options(self) -> dict[str, Any]:
        """Return the arguments of zarr.create_array."""
        tail = self.row_shape
        level = LEVEL if self.order == "sample" else COMPONENT_LEVEL
        packed = [{"name": "zstd", "configuration": {"level": level, "checksum": True}}]
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


class StoredShard(NamedTuple):
    """One array's bytes of one shard, and the record that commits them."""

    array: ArrayLayout
    shard: Shard
    record: bytes

    @property
    def size(self) -> int:
        """Stored bytes according to the record."""
        return int.from_bytes(self.record[:8], "little")

    @property
    def key(self) -> str:
        """Key of the bytes in the store."""
        return self.array.file(self.shard)

    @property
    def name(self) -> str:
        """Return what a message calls it."""
        return f"{self.array.name} view {self.shard.view} rows {self.shard.start}..{self.shard.stop}"

    def is_of(self, digest: bytes) -> bool:
        """Whether the record commits bytes with this sha256."""
        return seal(digest, self.key) == self.record[8:]


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
    """Arrays that are written and committed together: one target of one teacher, or what is recorded of the views.

    `errors` is the array of the errors of its rows, where these are recorded; it is one of `arrays`, the last.
    """

    name: str
    arrays: tuple[ArrayLayout, ...]
    tables: tuple[TableLayout, ...] = ()
    errors: ArrayLayout | None = None
    teacher: str = ""
    target: str = ""

    @property
    def rows(self) -> tuple[ArrayLayout, ...]:
        """The arrays that hold rows."""
        return self.arrays if self.errors is None else self.arrays[:-1]

    @property
    def commits(self) -> str:
        """Name of the array of commit records."""
        return f"{self.name}{COMMITS}"

    def record_file(self, shard: Shard) -> str:
        """Return the key of a shard's commit record in the store."""
        return f"{self.commits}/{self.arrays[0].record_file(shard).partition('/')[2]}"
