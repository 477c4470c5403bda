"""Killed or stopped at any moment, a run continues to the same bytes."""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcache.config.recipe import dump_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from tests.cache.made import Linear, contents, recipe, teacher
from tests.stage_one import killing, killing_images, killing_imports
from tests.stage_one.apart import program, stopped


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = program("killing", tmp_path_factory.mktemp("kill"))
    return found


def test_runs_are_killed_all_over_their_life(outcomes: list[dict[str, Any]]) -> None:
    assert len(outcomes) == killing.NUM_POINTS + killing.NUM_TIMES + killing.NUM_GROWN
    reached = {outcome["committed"] for outcome in outcomes if outcome["kind"] == "point"}
    assert 0 in reached
    assert len(reached) >= 4


def test_resume_after_kill_writes_identical_bytes(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome for outcome in outcomes if not outcome["identical"]] == []


def test_resume_after_kill_writes_no_committed_shard_again(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome for outcome in outcomes if not outcome["kept"]] == []
    begun = [outcome for outcome in outcomes if outcome["kind"] != "growth"]
    assert [outcome for outcome in begun if outcome["committed"] + outcome["written"] != 6] == []


def test_a_cache_that_grows_opens_after_any_kill_as_it_was_or_as_it_is_to_be(outcomes: list[dict[str, Any]]) -> None:
    grown = [outcome for outcome in outcomes if outcome["kind"] == "growth"]
    assert {outcome["opened"] for outcome in grown} == {11, 22}
    assert {outcome["written"] for outcome in grown} >= {0, 6}


def test_kill_leaves_nothing_beside_the_cache(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome for outcome in outcomes if outcome["beside"] != ["c.zarr"]] == []


class Slow(Linear):
    """A teacher that takes its time, so that a signal finds it at work."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.05)
        return super().forward(images)


def slow() -> Slow:
    return Slow()


def slow_recipe(cache: Path, **changes: Any) -> PrecomputeRecipe:
    model = {"kind": "custom", "factory": "tests.stage_one.test_kill:slow"}
    dataset = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 600}}
    changes |= {"dataset": dataset, "teachers": {"t": teacher(model=model)}, "shard_rows": 128, "batch_size": 32}
    return recipe(cache, **changes)


def num_records(cache: Path) -> int:
    """Count the shards that are committed."""
    return len(list(cache.glob("t.logits.commits/c.*")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "c.zarr"
    precompute(slow_recipe(path))
    return contents(path)


@pytest.mark.parametrize(
    ("signum", "code", "num_workers"),
    [(signal.SIGTERM, 75, 2), (signal.SIGINT, 130, 0)],
)
def test_a_signal_stops_at_a_shard_and_the_command_continues(
    signum: int, code: int, num_workers: int, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    cache = tmp_path / "c.zarr"
    plan = slow_recipe(cache, num_workers=num_workers, start_method="fork")
    (tmp_path / "r.yaml").write_text(dump_recipe(plan))
    found, errors = stopped(["precompute", str(tmp_path / "r.yaml")], signum, lambda: num_records(cache))
    assert found == code, errors
    assert "of the 10 shards that were to do are committed" in errors
    assert "Resume: logitcache precompute" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*logitcache-tmp"))
    records = num_records(cache)
    assert 1 <= records < 10
    assert len(list(cache.glob("t.logits/c.*"))) == records
    assert f"stopped: {records} of" in errors
    assert precompute(plan).shards_written == 10 - records
    assert contents(cache) == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["c.zarr", "r.yaml"]


def test_the_slow_teacher_answers_as_the_fast_one() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(Slow()(images), Linear()(images))


def test_written_views_imported_answers_and_synthesized_images_continue_after_a_kill_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    found = program("killing_imports", tmp_path)
    counts = Counter(one["command"] for one in found)
    few = killing_imports.NUM_KILLS
    assert counts == {"materialize": few, "import-targets": few, "synthesize": few + 3}
    assert [one for one in found if not one["identical"]] == []
    for commands in ({"materialize", "import-targets"}, {"synthesize"}):
        assert len({one["written"] for one in found if one["command"] in commands}) >= 3


def test_a_growth_in_images_continues_after_a_kill_while_students_read(tmp_path: Path) -> None:
    found = program("killing_images", tmp_path)
    assert len(found) == killing_images.NUM_KILLS
    assert [one for one in found if not (one["identical"] and one["kept"] and one["beside"])] == []
    assert [one for one in found if one["problems"] or one["opened"] not in (90, 120)] == []
    assert [one for one in found if one["reader"] not in (1, 2, 3)] == []
    assert {one["written"] for one in found} >= {0, 2}
