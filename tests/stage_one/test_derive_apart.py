"""Deriving that is killed, or shared by processes, ends with the bytes of one process; a summary with its figures."""

import json
from typing import Any

import pytest

from tests.stage_one import deriving
from tests.stage_one.apart import program


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = program("deriving", tmp_path_factory.mktemp("deriving"))
    return found


def test_resume_after_kill_writes_identical_bytes_and_nothing_beside(outcomes: dict[str, Any]) -> None:
    found = outcomes["killed"]
    assert len(found) == deriving.NUM_KILLS
    assert [outcome for outcome in found if not outcome["identical"] or outcome["beside"] != ["c.zarr"]] == []
    assert any(0 < outcome["begun"] < deriving.NUM_SHARDS for outcome in found)


def test_one_worker_and_two_of_which_one_dies_write_what_one_process_writes(outcomes: dict[str, Any]) -> None:
    assert outcomes["shared"] == [{"left": 0, "identical": True}] * 2


def test_two_parts_make_the_whole(outcomes: dict[str, Any]) -> None:
    assert outcomes["parts"] == {"written": [deriving.NUM_SHARDS // 2] * 2, "identical": True}


def test_a_summary_by_workers_has_the_figures_of_one_process(outcomes: dict[str, Any]) -> None:
    found = outcomes["summaries"]
    assert found["there"] == found["here"]
    assert len(json.loads(found["here"])["teachers"]) == 3


def test_a_damaged_shard_that_a_worker_finds_is_named(outcomes: dict[str, Any]) -> None:
    message = outcomes["summaries"]["damaged"]
    assert "b.logits view 1 rows 128..256: its bytes differ" in message
    assert "On worker: " in message
