"""The arithmetic of costs, against real caches, plain loops and a simulation."""

import heapq
import itertools
from pathlib import Path
from typing import Any

import pytest

from logitcache.cache.format.layout import layout_of
from logitcache.cache.format.row_errors import NUM_STATISTICS
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.writer import THREADS
from logitcache.planning.costs import (
    break_even,
    fill_seconds,
    memory_of,
    requests_of_writing,
    shard_sizes,
    skeleton_sizes,
    store_cost,
)
from tests.cache.made import COUNT, DENSE16, TOP2, UINT8, made, shard_files

ERRORS = {"t.logits.errors": 500.0}
"""Bytes that compression leaves of the errors of a shard, by packed array."""

HOT = {"dense16": (DENSE16, 128), "top_k": (TOP2, None), "uint8": (UINT8, None)}
"""Encodings, and shard_rows that fill whole pages."""


@pytest.mark.parametrize("name", HOT)
def test_files_and_bytes_of_hot_arrays_are_those_on_the_disk(name: str, tmp_path: Path) -> None:
    made(tmp_path / "c", HOT[name][0], COUNT, HOT[name][1])
    manifest = open_snapshot(tmp_path / "c").manifest
    layout = layout_of(manifest)
    errors = {"t.logits.errors": 0.0}
    cost = store_cost(layout, errors, skeleton_sizes(manifest))
    assert cost.rows == COUNT * layout.num_views
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert cost.files == len(files)
    for array in cost.arrays:
        stored = [path.stat().st_size for path in shard_files(tmp_path / "c", array.name)]
        assert array.files == len(stored)
        if array.storage == "hot":
            assert array.bytes == sum(stored)
    sizes = skeleton_sizes(manifest)
    assert sizes == {key: (tmp_path / "c" / key).stat().st_size for key in sizes}
    records = list((tmp_path / "c").glob("*.commits/c.*"))
    assert (cost.records, cost.record_bytes) == (len(records), sum(path.stat().st_size for path in records))


def test_what_is_missing_is_counted_alone(tmp_path: Path) -> None:
    layout = made(tmp_path / "c", DENSE16, COUNT).layout
    [group], shards = layout.groups, list(layout.shards())
    parts = [store_cost(layout, ERRORS, {}, {group.name: some}) for some in (shards[:2], shards[2:], [])]
    whole = store_cost(layout, ERRORS, {})
    assert sum(part.bytes for part in parts) == whole.bytes
    assert sum(part.files for part in parts) == whole.files
    assert [part.rows for part in parts] == [256, 2 * COUNT - 256, 0]
    assert sum(rows * count for rows, count in shard_sizes(layout).items()) == whole.rows


def test_requests_are_counted_by_file(tmp_path: Path) -> None:
    cache = made(tmp_path / "c", DENSE16, COUNT)
    manifest, layout = open_snapshot(tmp_path / "c").manifest, cache.layout
    cost = store_cost(layout, ERRORS, skeleton_sizes(manifest))
    writing = requests_of_writing(cost, layout)
    arrays, shards = len(layout.arrays), layout.num_shards
    assert writing.puts == cost.files == arrays * shards + shards + len(skeleton_sizes(manifest))


def simulated(rows: int, shards: int, loop: float, write: float) -> float:
    """Fill shards one after the other; each is then written by one of the threads, as soon as one is free."""
    free, now = [0.0] * THREADS, 0.0
    pending: list[float] = []
    for _ in range(shards):
        now += rows / shards * loop
        if len(pending) >= THREADS:
            now = max(now, pending.pop(0))
        begin = max(now, heapq.heappop(free))
        heapq.heappush(free, begin + rows / shards * write)
        pending.append(begin + rows / shards * write)
    return max(now, *pending)


@pytest.mark.parametrize("shards", [1, 2, 7, 100])
@pytest.mark.parametrize("write", [0.0, 0.3, 1.0, 1.9, 2.1, 5.0])
def test_writing_behind_takes_what_a_simulation_takes(shards: int, write: float) -> None:
    predicted = fill_seconds(1000, shards, 1.0, write, 0.0, num_cores=16)
    assert predicted == pytest.approx(simulated(1000, shards, 1.0, write), rel=0.15 if 1 < shards < 100 else 0.02)


@pytest.mark.parametrize(("seconds", "answer"), [(100.0, 1.0), (99.0, 1.0), (350.0, 1.0), (10.0, 0.01)])
def test_a_cache_pays_from_the_first_number_of_students_that_costs_less(seconds: float, answer: float) -> None:
    rows = 100
    first = next(count for count in itertools.count(1) if seconds < count * rows * answer)
    assert break_even(seconds, rows, answer) == first
    assert break_even(seconds, rows, 0.0) is None


def test_memory_is_of_shards_and_batches_and_not_of_the_data_set(tmp_path: Path) -> None:
    def memory(name: str, count: int, **changes: Any) -> Any:
        cache = made(tmp_path / name, DENSE16, count)
        cost = store_cost(cache.layout, ERRORS, {})
        options = {"image_bytes": 48, "batch_size": 50, "num_workers": 2, "views_per_image": 1, **changes}
        return memory_of(cache.layout, cost, **options)

    small, large, twice = memory("a", 300), memory("b", 900), memory("c", 300, views_per_image=2)
    assert small.filling == large.filling == 128 * 16 * 2 + 2 * NUM_STATISTICS * 8
    assert twice.filling == 2 * small.filling
    assert small.rendered == 5 * 50 * 48
    assert small.total == small.filling + small.waiting + small.rendered
