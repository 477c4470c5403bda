"""Arithmetic of costs: bytes, files, requests, memory and time of a cache. Nothing is measured or read here.

Files and the bytes of hot arrays are exact: they follow from the layout, as the store does. The compressed bytes of
packed arrays and the seconds of a row-view are arguments: `plan` measures them by a probe,
docs/explanation/scale.md assumes them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from logitcache.cache.format.arrays import ArrayLayout, Storage
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.samples import sample_sizes
from logitcache.cache.write.writer import THREADS
from logitcache.store.shards import RECORD_BYTES, Shard

LISTED = 1000
"""Keys in one answer of an object store."""

PREFETCH = 2
"""Batches that each process renders ahead."""

ShardSizes = Mapping[int, int]
"""How many shards there are of so many rows."""


@dataclass(frozen=True)
class ArrayCost:
    """One array: `files` are its shards, `bytes` their sum; `row_bytes` are those of a row before compression."""

    name: str
    group: str
    storage: Storage
    row_bytes: int
    files: int
    bytes: int


@dataclass(frozen=True)
class StoreCost:
    """The files of a cache: the shards of each array, a commit record by group and shard, and the skeleton."""

    rows: int
    arrays: tuple[ArrayCost, ...]
    records: int
    record_bytes: int
    skeleton: int
    skeleton_bytes: int

    @property
    def files(self) -> int:
        """Files, or objects."""
        return sum(array.files for array in self.arrays) + self.records + self.skeleton

    @property
    def bytes(self) -> int:
        """Bytes of all files, not rounded up to blocks of a file system."""
        return sum(array.bytes for array in self.arrays) + self.record_bytes + self.skeleton_bytes

    @property
    def bytes_per_row(self) -> float:
        """Bytes of all files by row-view, an image in one view."""
        return self.bytes / self.rows


def store_cost(
    layout: Layout,
    packed: Mapping[str, float],
    skeleton: Mapping[str, int],
    missing: Mapping[str, Iterable[Shard]] | None = None,
) -> StoreCost:
    """Return the cost of a whole cache; with `missing`, shards by group, the cost of these.

    `packed` has the compressed bytes of a row of each packed array by name (of the errors of rows: of a shard), without
    the index of its shard; `skeleton` has the size of every file that is no shard and no record.
    """
    whole = shard_sizes(layout)
    arrays, num_records, record_bytes, rows = [], 0, 0, 0
    for group in layout.groups:
        sizes = whole if missing is None else Counter(shard.stop - shard.start for shard in missing[group.name])
        count = sum(sizes.values())
        arrays += [array_cost(array, group.name, sizes, packed.get(array.name)) for array in group.arrays]
        num_records += count
        record_bytes += count * RECORD_BYTES * len(group.arrays)
        rows = max(rows, sum(size * number for size, number in sizes.items()))
    return StoreCost(rows, tuple(arrays), num_records, record_bytes, len(skeleton), sum(skeleton.values()))


def shard_sizes(layout: Layout) -> ShardSizes:
    """Count the shards of an array by their rows: the last of each view may have fewer."""
    full, rest = divmod(layout.num_images, layout.shard_rows)
    sizes = {layout.shard_rows: full * layout.num_views, rest: layout.num_views}
    return {rows: count for rows, count in sizes.items() if rows and count}


def array_cost(array: ArrayLayout, group: str, sizes: ShardSizes, packed: float | None) -> ArrayCost:
    """Return the cost of an array in shards of these sizes; `packed`: compressed bytes of a row."""
    total = sum(count * shard_bytes(array, rows, packed) for rows, count in sizes.items())
    return ArrayCost(array.name, group, array.storage, array.row_bytes, sum(sizes.values()), round(total))


def shard_bytes(array: ArrayLayout, images: int, packed: float | None) -> float:
    """Return the stored bytes of a shard of `images` images, exact if the array is hot."""
    rows = -(-images // array.images_per_row)
    if array.storage == "hot":
        return array.hot_bytes(rows)
    assert packed is not None, f"{array.name} is packed: its compressed bytes have to be given"
    return rows * packed + array.hot_bytes(0)  # of no rows: the index alone


def skeleton_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the size of every file of a finished cache that is no shard and no record, by key."""
    sizes = {key: len(data) for key, data in metadata_files(manifest).items()}
    tables = {table.file: table.num_bytes for table in layout_of(manifest).tables}
    return {**sizes, **tables, **sample_sizes(manifest)}


@dataclass(frozen=True)
class Requests:
    """Requests to an object store, by the kinds that it charges for."""

    puts: int
    gets: int
    lists: int


def requests_of_writing(store: StoreCost, layout: Layout) -> Requests:
    """Return the requests of stage one: it puts each file once, lists the records twice, and reads errors to add up."""
    measured = sum(group.errors is not None for group in layout.targets)
    return Requests(store.files, measured * layout.num_shards, 2 * num_lists(layout))


def num_lists(layout: Layout) -> int:
    """Return how many answers it takes to list all commit records."""
    return len(layout.groups) * max(1, math.ceil(layout.num_shards / LISTED))


def fill_seconds(
    rows: int, shards: int, loop: float, write: float, busy: float, num_cores: int, num_processes: int = 1
) -> float:
    """Return the seconds in which `rows` row-views in `shards` shards are rendered, answered and written.

    loop, write, busy: seconds by row-view of the loop by the clock, of a thread that writes, and of all cores in both.
    `num_processes`, of `num_cores` each, share the rows. Shards are written behind the loop, by two threads, if cores
    are free; the last shard is waited for:
    max(rows · loop + write of a shard, loop of a shard + rows · write / threads, rows · busy / number of cores).
    """
    each, own = math.ceil(rows / num_processes), math.ceil(shards / num_processes)
    first, last = each / max(1, own) * loop, each / max(1, own) * write
    behind = first + each * write / min(THREADS, num_cores, max(1, own))
    return max(each * loop + last, behind, each * busy / num_cores)


def break_even(seconds: float, rows: int, answer: float) -> int | None:
    """Return the least number of students for which a cache is cheaper than a teacher in each loop; None: never.

    A teacher in the loop of a student that sees all V views of N images answers N · V times. n students cost
    n · N · V · `answer` seconds more than training alone; a cache costs its `seconds` once, and reading it counts as
    nothing (benchmarks/read.py). So n is the least whole number above seconds / (N · V · answer), rows being N · V.
    """
    online = rows * answer
    return math.floor(seconds / online) + 1 if online > 0 else None


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one process of stage one, besides interpreter, teacher and the index of images.

    filling: rows of the shards that are computed. waiting: rows and stored bytes of the shards that are written.
    rendered: batches of pixels from the processes that render.
    """

    filling: int
    waiting: int
    rendered: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.filling + self.waiting + self.rendered


def memory_of(
    layout: Layout, store: StoreCost, image_bytes: int, batch_size: int, num_workers: int, views_per_image: int
) -> Memory:
    """Return the memory of one process of stage one: bounded by shards and batches, whatever the data set's size."""
    rows = min(layout.shard_rows, layout.num_images)
    shard = sum(array.row_bytes * -(-rows // array.images_per_row) for array in layout.arrays)
    stored = max(math.ceil(array.bytes / max(1, array.files)) for array in store.arrays)
    batches = 1 + PREFETCH * num_workers
    rendered = batches * batch_size * views_per_image * image_bytes
    return Memory(views_per_image * shard, THREADS * (shard + stored), rendered)
