"""docs/explanation/scale.md, the commands that print its figures, and the caches that they simulate."""

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

from logitcache.cache.cache import open_cache
from logitcache.cache.format.layout import layout_of
from logitcache.logits import log_probs
from logitcache.planning.costs import skeleton_sizes, store_cost
from logitcache.views.keys import ViewKey
from tests.cache.made import COUNT, DENSE16, made

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "explanation" / "scale.md").read_text()
IMAGES, VIEWS = 1500, 2
NAMES = ("scale", "scale_limits", "scale_metadata", "scale_model", "scale_tables")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """Import the benchmarks, which are scripts and import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield {name: importlib.import_module(name) for name in NAMES}


@pytest.fixture
def simulated(scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a small cache, whose files of one size are one file as those of a large one are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "remembered"))
    scripts["scale_metadata"].simulated(tmp_path / "c.zarr", IMAGES, VIEWS)
    return tmp_path / "c.zarr"


def test_every_table_of_the_page_is_what_the_command_prints(scripts: dict[str, ModuleType]) -> None:
    tables = scripts["scale_tables"]
    for title, rows in tables.tables():
        assert f"## {title}\n" in TEXT
        assert tables.markdown(rows) in TEXT, f"{title}: paste what python benchmarks/scale_tables.py prints"


def test_every_command_and_link_of_the_page_leads_somewhere() -> None:
    commands = re.findall(r"python (benchmarks/\w+\.py)", TEXT)
    assert {Path(name).stem for name in commands} >= {"scale", "scale_limits", "scale_metadata", "scale_tables"}
    for target in [*(f"../{name}" for name in commands), *re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)]:
        assert (ROOT / "docs" / target).exists(), target


def test_time_is_that_of_the_gpu_with_most_shards(scripts: dict[str, ModuleType]) -> None:
    model = scripts["scale_model"]
    case = model.case_of(model.SCENARIOS[0], "packed top-10")
    for gpus in (8, 1024):
        rows = np.zeros(gpus)
        for number, shard in enumerate(case.layout.shards()):
            rows[number % gpus] += shard.stop - shard.start
        pace = 1 / model.TEACHER_RATE + model.KEEP_SECONDS
        assert model.seconds_on(case, gpus) == pytest.approx(rows.max() * pace, rel=0.03)


def test_larger_shards_take_fewer_files_of_the_same_bytes(scripts: dict[str, ModuleType]) -> None:
    model = scripts["scale_model"]
    large = model.case_of(model.SCENARIOS[-1], "packed top-10")
    small = model.case_of(large.scenario, large.form, 65_536)
    assert large.store.files * 15 < small.store.files
    assert large.store.bytes == pytest.approx(small.store.bytes, rel=0.01)
    of_a_view = model.requests_of_a_view
    assert of_a_view(large.store, large.layout).gets < of_a_view(small.store, small.layout).gets / 10


def test_reading_requests_are_counted_by_file(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    model, cache = scripts["scale_model"], made(tmp_path / "c", DENSE16, COUNT)
    layout, arrays = cache.layout, len(cache.layout.arrays)
    cost = store_cost(layout, {"t.logits.errors": 500.0}, skeleton_sizes(cache.manifest))
    assert model.requests_of_opening(cost, layout).gets == cost.files - arrays * layout.num_shards
    assert model.requests_of_a_view(cost, layout).gets == arrays * layout.shards_per_view


def test_the_slowest_stage_governs_and_few_cores_add_up(scripts: dict[str, ModuleType]) -> None:
    model = scripts["scale_model"]
    Pace, Crew, loop_seconds, wall_seconds = model.Pace, model.Crew, model.loop_seconds, model.wall_seconds
    pace = Pace(render=8.0, answer=3.0, keep=1.0, write=0.5)
    assert loop_seconds(pace, Crew(num_workers=0, cores=8)) == 12.0
    assert loop_seconds(pace, Crew(num_workers=1, cores=8)) == 8.0
    assert loop_seconds(pace, Crew(num_workers=4, cores=8)) == 4.0
    assert loop_seconds(pace, Crew(num_workers=4, cores=2)) == 6.0
    assert loop_seconds(pace, Crew(num_workers=4, cores=2, threads=2)) == 7.5
    assert wall_seconds(1000, 10, pace, Crew(4, cores=2)) == pytest.approx(1000 * 12.5 / 2)


def test_processes_share_the_rows(scripts: dict[str, ModuleType]) -> None:
    Pace, Crew, wall_seconds = (getattr(scripts["scale_model"], name) for name in ("Pace", "Crew", "wall_seconds"))
    pace = Pace(render=1.0, answer=2.0, keep=0.0, write=0.0)
    assert wall_seconds(800, 8, pace, Crew(2, cores=8, processes=4)) == 200 * 2.0
    assert wall_seconds(800, 8, pace, Crew(2, cores=8, processes=8)) == 100 * 2.0


def test_a_simulated_cache_is_a_cache(simulated: Path) -> None:
    cache = open_cache(simulated)
    assert (cache.complete, len(cache), cache.num_views) == (True, IMAGES, VIEWS)
    answers = log_probs(cache.answers([ViewKey(1, IMAGES - 1), ViewKey(0, IMAGES - 1)])["t"], 1.0)
    assert answers.exp().sum(dim=1).tolist() == pytest.approx([1, 1], abs=0.02)
    stored = np.asarray(zarr.open_array(simulated / "t.logits.fall", mode="r")[:, -100:])
    assert stored.any()
    np.testing.assert_array_equal(stored[0], stored[1])


def test_a_cache_of_more_images_has_holes_for_their_labels(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = scripts["scale_metadata"]
    monkeypatch.setattr(metadata, "MOST_IMAGES", 500)
    shards = metadata.simulated(tmp_path / "c.zarr", IMAGES, VIEWS)
    store = metadata.model(shards, metadata.manifest_at(tmp_path / "c.zarr"))
    assert metadata.counted(tmp_path / "c.zarr") == (store.files, pytest.approx(store.bytes, rel=0.01))


def test_steps_of_a_simulated_cache_find_what_there_is(scripts: dict[str, ModuleType], simulated: Path) -> None:
    metadata = scripts["scale_metadata"]
    layout = layout_of(metadata.manifest_at(simulated))
    assert metadata.list_shards(simulated) == layout.num_shards
    assert metadata.verify(simulated) == 0
    (simulated / layout.groups[0].record_file(layout.shard(1, 0))).unlink()
    assert metadata.resume(simulated) == 1
    metadata.compare(simulated)
    array = layout.arrays[0]
    file = simulated / array.file(layout.shard(0, 0))
    changed = bytearray(file.read_bytes())
    changed[5] ^= 1
    os.truncate(file, 0)
    file.write_bytes(changed)
    # Whole shards are links to one file.
    assert metadata.verify(simulated) == sum(one.stop - one.start == layout.shard_rows for one in layout.shards())


def test_bytes_and_files_of_runs_are_those_of_the_model(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = list(scripts["scale"].run_rows(tmp_path, {512: 1, 1536: 1}))
    figures = {row.case: row for row in rows if "CPU" not in row.case and "flat" not in row.case}
    assert len(figures) == 4
    assert all(row.met for row in figures.values()), figures


def test_indices_are_of_the_images_that_are_there(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    limits = scripts["scale_limits"]
    limits.write_folder(tmp_path / "images", 30)
    limits.write_shards(tmp_path / "shards", 30)
    assert limits.open_folder(tmp_path / "images") > 0
    assert limits.open_shards(tmp_path / "shards") > 30 * 56
