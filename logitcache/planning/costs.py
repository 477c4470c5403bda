"""What a cache costs, by plain arithmetic: bytes, files, requests, memory, time and hours of GPUs.

Nothing is measured and nothing is read here. Files, and the bytes of hot arrays, are exact: they come from the layout
that the store itself is written by. What compression leaves of packed arrays, and the seconds that an image takes, are
arguments: `plan` measures them by a probe, docs/scale.md assumes them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from logitcache.cache.format.label_file import label_file
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import CANARIES, DIGESTS, metadata_files
from logitcache.cache.write.writer import THREADS
from logitcache.store.arrays import RECORD_BYTES, ArrayLayout, Shard, Storage
from logitcache.store.remote.client import PART

LISTED = 1000
"""Keys that one answer of an object store lists."""

PREFETCH = 2
"""Batches that each process renders ahead."""

ShardSizes = Mapping[int, int]
"""How many shards there are of so many rows."""


@dataclass(frozen=True)
class ArrayCost:
    """One array: files are its shards, `bytes` what all of them take; `row_bytes` are those of a row uncompressed."""

    name: str
    group: str
    storage: Storage
    row_bytes: int
    files: int
    bytes: int


@dataclass(frozen=True)
class StoreCost:
    """What is stored: the shards of every array, a commit record for each group and shard, and all other files."""

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
        """Bytes of all files; blocks that a file system rounds up to are not counted."""
        return sum(array.bytes for array in self.arrays) + self.record_bytes + self.skeleton_bytes

    @property
    def bytes_per_row(self) -> float:
        """Bytes of everything by row-view, an image in one view."""
        return self.bytes / self.rows

    @property
    def largest_folder(self) -> int:
        """Files of the folder that has most: the shards of one array."""
        return max(array.files for array in self.arrays)


def store_cost(
    layout: Layout,
    packed: Mapping[str, float],
    skeleton: Mapping[str, int],
    missing: Mapping[str, Iterable[Shard]] | None = None,
) -> StoreCost:
    """Return what a whole cache takes; with `missing`, shards by group, what these would add to it.

    `packed` has, by array name, the bytes that compression leaves of a row of a packed array (of the errors of rows:
    of a shard), without the index of its shard; `skeleton` has the size of every file that is no shard and no record.
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
    """Count all shards of an array by their rows: the last of each view may have fewer."""
    full, rest = divmod(layout.num_images, layout.shard_rows)
    sizes = {layout.shard_rows: full * layout.num_views, rest: layout.num_views}
    return {rows: count for rows, count in sizes.items() if rows and count}


def array_cost(array: ArrayLayout, group: str, sizes: ShardSizes, packed: float | None) -> ArrayCost:
    """Return what an array takes of shards of these sizes; `packed`: bytes of a row after compression."""
    total = sum(count * shard_bytes(array, rows, packed) for rows, count in sizes.items())
    return ArrayCost(array.name, group, array.storage, array.row_bytes, sum(sizes.values()), round(total))


def shard_bytes(array: ArrayLayout, images: int, packed: float | None) -> float:
    """Return the stored bytes of the shard that holds `images` images: exact where the array is hot."""
    rows = -(-images // array.images_per_row)
    if array.storage == "hot":
        return array.hot_bytes(rows)
    assert packed is not None, f"{array.name} is packed: what compression leaves of it has to be given"
    return rows * packed + array.hot_bytes(0)  # of no rows: the index alone


def skeleton_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the size of every file of a finished cache that is no shard and no record, by key."""
    sizes = {key: len(data) for key, data in metadata_files(manifest).items()}
    labels = label_file(manifest.fingerprint)
    pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
    tables = {table.file: table.num_bytes for table in layout_of(manifest).tables}
    return {**sizes, **tables, labels.key: labels.num_bytes, DIGESTS: 8 * manifest.num_images, CANARIES: pixels}


@dataclass(frozen=True)
class Requests:
    """What an object store is asked, by the kinds that it charges for."""

    puts: int
    gets: int
    lists: int


def requests_of_writing(store: StoreCost, layout: Layout) -> Requests:
    """Return what stage one asks: it puts every file once, lists the records before and after, and adds up errors."""
    measured = sum(group.errors is not None for group in layout.targets)
    return Requests(store.files, measured * layout.num_shards, 2 * _lists(layout))


def requests_of_opening(store: StoreCost, layout: Layout) -> Requests:
    """Return what a machine asks when it opens a cache for the first time: all but the shards."""
    return Requests(0, store.skeleton + store.records, _lists(layout))


def requests_of_a_view(store: StoreCost, layout: Layout) -> Requests:
    """Return what a student asks for one view of all targets, each shard in parts of 8 MiB; nothing comes twice."""
    parts = sum(array.files * max(1, math.ceil(array.bytes / array.files / PART)) for array in store.arrays)
    return Requests(0, math.ceil(parts / layout.num_views), 0)


def _lists(layout: Layout) -> int:
    return len(layout.groups) * max(1, math.ceil(layout.num_shards / LISTED))


@dataclass(frozen=True)
class Pace:
    """Seconds that one row-view (an image in one view) takes in each stage, by itself.

    render: reading and augmenting, in one process. answer: all teachers. keep: encoding their answers on the device and
    copying them to their shard. write: compressing and hashing the shard's bytes, in one thread.
    """

    render: float
    answer: float
    keep: float
    write: float


@dataclass(frozen=True)
class Crew:
    """Who works: `processes`, each with a device; of each the processes that render, its cores, torch's threads.

    `threads` are those that a teacher keeps busy: 1 on a GPU, which a process waits for.
    """

    num_workers: int
    cores: int
    threads: int = 1
    processes: int = 1


def loop_seconds(pace: Pace, crew: Crew) -> float:
    """Return the seconds by row-view of one process's loop of stage one, without writing.

    The slowest stage governs; where there are too few cores, they add up:
    max(answer + keep, render / workers, (render + threads · answer + keep) / cores).
    """
    main = pace.answer + pace.keep
    if crew.num_workers == 0:
        return main + pace.render
    busy = pace.render + crew.threads * pace.answer + pace.keep
    return max(main, pace.render / crew.num_workers, busy / crew.cores)


def fill_seconds(rows: int, shards: int, loop: float, write: float, cores: float, crew: Crew) -> float:
    """Return the seconds in which `rows` row-views in `shards` shards are rendered, answered and written.

    loop, write, cores: seconds by row-view of the loop by the clock, of a thread that writes, and of all cores in both.
    Shards are written behind the loop, by two threads, as far as cores are free; the last shard is waited for:
    max(rows · loop + write of a shard, loop of a shard + rows · write / threads, rows · cores / number of cores).
    """
    each, own = math.ceil(rows / crew.processes), math.ceil(shards / crew.processes)
    first, last = each / max(1, own) * loop, each / max(1, own) * write
    behind = first + each * write / min(THREADS, crew.cores, max(1, own))
    return max(each * loop + last, behind, each * cores / crew.cores)


def wall_seconds(rows: int, shards: int, pace: Pace, crew: Crew) -> float:
    """Return the seconds from the first batch to the last commit, where only the stages' own pace is known."""
    cores = pace.render + crew.threads * pace.answer + pace.keep + pace.write
    return fill_seconds(rows, shards, loop_seconds(pace, crew), pace.write, cores, crew)


def device_hours(seconds: float, processes: int) -> float:
    """Return the hours of GPUs that `processes` with one each take, working or waiting."""
    return processes * seconds / 3600


def break_even(seconds: float, rows: int, answer: float) -> int | None:
    """Return from how many students on a cache is cheaper than the teacher in every student's loop; None: never.

    A student that sees all V views of N images asks a teacher in its loop V · N times. n students cost n · N · V ·
    `answer` seconds more than training alone; with a cache they cost its `seconds`, once, and reading it counts as
    nothing (benchmarks/read.py). So n is the least whole number above seconds / (N · V · answer), rows being N · V.
    """
    online = rows * answer
    return math.floor(seconds / online) + 1 if online > 0 else None


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of stage one holds at its peak, besides interpreter, teacher and the index of images.

    filling: rows of the shards that are filled. waiting: rows of those that are written, and their stored bytes.
    rendered: batches of pixels on their way from the processes that render.
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
