"""Three large caches by the model that `logitcache plan` predicts with: what scale_tables.py writes down.

Prices, and how fast teachers and rendering are, are ASSUMED: replace these constants by your own. What compression
leaves of packed arrays was measured on the answers of a real model (benchmarks/encodings.py); memory and CPU time by
image, by shard and by byte by scale_limits.py and scale_metadata.py.
"""

import functools
import math
from typing import Any, NamedTuple

from read import manifest_of

from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.shard_rows import choose_shard_rows
from logitcache.planning.costs import Requests, StoreCost, fill_seconds, num_lists, skeleton_sizes, store_cost
from logitcache.store.remote.client import PART

DATE = "22 November 2026"
USD_GPU_HOUR, USD_GB_MONTH, USD_1000_PUTS, USD_1000_GETS = 2.5, 0.023, 0.005, 0.0004
"""Assumed at that date, not looked up: of one data-centre GPU, and of object storage."""

TEACHER_RATE, RENDER_RATE, WORKERS, CORES = 1000.0, 150.0, 12, 16
"""Assumed: images a second of the teacher on one GPU, and of one process that renders; processes and cores by GPU."""

KEEP_SECONDS, PACK_SECONDS, WRITE_RATE = 10e-6, 15e-6, 500e6
"""Of a row-view: encoding and copying; compressing a packed row. Bytes a second that the writer keeps of hot rows."""

LATENCY = 0.05
"""Assumed: seconds that object storage takes to answer."""

BATCH, PIXELS, VIEWS_PER_IMAGE = 256, 3 * 224 * 224, 2

FALL_BYTES, TAIL_BYTES, INDEX_SHARE, ERRORS_BYTES = 5.94, 5.14, 0.945, 640.0
"""What compression leaves of packed top-10: falls and tails of a row, a share of the classes, the errors of a shard."""

ORDER_BYTES, SHUFFLE_BYTES, MIXED_BYTES, BLOCKED_MB = 13.0, 15.0, 13.0, 12.0
"""Peaks of memory by image, measured by scale_limits.py: a permutation, an epoch's order, that of mixed images; and of
an order in blocks, whatever the number of images."""

FOLDER_BYTES, FOLDER_AGAIN_BYTES, FOLDER_SHARED_BYTES = 240.0, 165.0, 45.0
TAR_BYTES, TAR_SHARED_BYTES, TASK_BYTES = 115.0, 36.0, 7500.0
"""By the same: opening an image folder, at first and again, and tar shards, what of either the processes that render
share; by task of Dask."""

SKELETON_BYTES, LABELS_BYTES = 8.0, 16.0
"""By scale_metadata.py, by image: opening a cache, and reading its labels."""

ORDER_SECONDS, FOLDER_SECONDS, FOLDER_AGAIN_SECONDS, SKELETON_SECONDS = 250e-9, 100e-6, 25e-6, 30e-9
COMPARE_SECONDS, AGAIN_SECONDS, TASK_SECONDS, INSPECT_SECONDS = 1.0e-9, 50e-6, 1.7e-3, 13e-9
"""CPU time by the same, by image; by byte, by file, by task, and by image and class."""

MAPPINGS = 65_530
"""Files that a process of Linux may map, unless told."""


class Scenario(NamedTuple):
    """A data set and how many views of it there are."""

    name: str
    images: int
    classes: int
    views: int


SCENARIOS = (
    Scenario("ImageNet-1k × 300", 1_281_167, 1000, 300),
    Scenario("ImageNet-22k × 90", 14_197_122, 21_841, 90),
    Scenario("1 billion × 4", 1_000_000_000, 21_841, 4),
)
FORMS: dict[str, dict[str, Any]] = {
    "packed top-10": {"kind": "packed_top_k", "k": 10},
    "top-100": {"kind": "top_k", "k": 100},
    "dense float16": {"kind": "dense"},
}


class Case(NamedTuple):
    """A scenario in one encoding."""

    scenario: Scenario
    form: str
    manifest: Manifest
    layout: Layout
    store: StoreCost

    @property
    def rows(self) -> int:
        """Row-views: an image in one view is one."""
        return self.scenario.images * self.scenario.views


def case_of(scenario: Scenario, form: str, shard_rows: int | None = None) -> Case:
    """Lay out a scenario's cache and count what it takes; shards are as `precompute` chooses them, or as asked."""
    small, _ = manifest_of(FORMS[form], 1000, scenario.views, scenario.classes)
    fingerprint = small.fingerprint.model_copy(update={"num_images": scenario.images})
    rows = choose_shard_rows(list(small.teachers.values()), scenario.images, shard_rows)
    manifest = small.model_copy(update={"fingerprint": fingerprint, "shard_rows": rows})
    layout = layout_of(manifest)
    index = next((array.row_bytes for array in layout.arrays if array.suffix == "index"), 0)
    packed = {
        "t.logits.index": index * INDEX_SHARE,
        "t.logits.fall": FALL_BYTES,
        "t.logits.tail": TAIL_BYTES,
        "t.logits.errors": ERRORS_BYTES,
    }
    return Case(scenario, form, manifest, layout, store_cost(layout, packed, skeleton_sizes(manifest)))


@functools.cache
def every_case() -> tuple[Case, ...]:
    """Return every scenario in every encoding."""
    return tuple(case_of(scenario, form) for scenario in SCENARIOS for form in FORMS)


class Pace(NamedTuple):
    """Seconds that one row-view (an image in one view) takes in each stage, by itself.

    render: reading and augmenting, in one process. answer: all teachers. keep: encoding their answers on the device and
    copying them to their shard. write: compressing and hashing the shard's bytes, in one thread.
    """

    render: float
    answer: float
    keep: float
    write: float


class Crew(NamedTuple):
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


def wall_seconds(rows: int, shards: int, pace: Pace, crew: Crew) -> float:
    """Return the seconds from the first batch to the last commit, from the stages' own pace."""
    busy = pace.render + crew.threads * pace.answer + pace.keep + pace.write
    return fill_seconds(rows, shards, loop_seconds(pace, crew), pace.write, busy, crew.cores, crew.processes)


def requests_of_opening(store: StoreCost, layout: Layout) -> Requests:
    """Return the requests of a machine that opens a cache for the first time: all but the shards."""
    return Requests(0, store.skeleton + store.records, num_lists(layout))


def requests_of_a_view(store: StoreCost, layout: Layout) -> Requests:
    """Return the requests of a student for one view of all targets, each shard in parts of 8 MiB, none twice."""
    parts = sum(array.files * max(1, math.ceil(array.bytes / array.files / PART)) for array in store.arrays)
    return Requests(0, math.ceil(parts / layout.num_views), 0)


def pace_of(case: Case) -> Pace:
    """Return the assumed seconds by row-view."""
    hot = sum(array.row_bytes for array in case.layout.arrays if array.storage == "hot")
    packs = any(array.storage == "packed" and not array.per_shard for array in case.layout.arrays)
    write = PACK_SECONDS * packs + hot / WRITE_RATE
    return Pace(1 / RENDER_RATE, 1 / TEACHER_RATE, KEEP_SECONDS, write)


def seconds_on(case: Case, gpus: int) -> float:
    """Return the time of stage one: that of the GPU which has most shards, as a shard is computed whole."""
    most, shards = math.ceil(case.layout.num_shards / gpus), case.layout.num_shards
    rows = math.ceil(case.rows * most * gpus / shards)
    return wall_seconds(rows, most * gpus, pace_of(case), Crew(WORKERS, CORES, 1, gpus))
