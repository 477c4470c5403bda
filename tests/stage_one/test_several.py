"""Several processes fill one cache: they share its shards, and whatever happens to one, the bytes are the same."""

import errno
import fcntl
import io
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from logitcache.cache.write.writer_locks import preparing
from logitcache.errors import CacheError, RecipeError
from logitcache.runtime import console
from logitcache.runtime.stopping import StopFlag
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.precompute import precompute
from logitcache.store.local import LocalStore
from tests.cache.made import Linear, Pixels, contents, recipe, run
from tests.stage_one.apart import program, until
from tests.stage_one.runs import NUM_IMAGES, whole
from tests.stage_one.several import NUM_SHARDS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = program("several", tmp_path_factory.mktemp("several"))
    return found


def test_every_outcome_is_what_one_process_writes(outcomes: dict[str, dict[str, Any]]) -> None:
    assert len(outcomes) == 12
    assert {name: found for name, found in outcomes.items() if not found["identical"]} == {}
    assert {name: found for name, found in outcomes.items() if found["beside"] != ["c.zarr"]} == {}


def test_processes_that_start_together_share_the_work(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["at_once"]
    assert sum(found["written"]) == NUM_SHARDS
    assert min(found["written"]) >= 1
    assert min(found["left"]) == 0


def test_parts_are_shared_without_talking(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["by_parts"]
    assert found["written"] == [2, 3, 2, 2]
    assert min(found["left"]) == 0


def test_the_other_process_does_what_a_killed_one_claimed(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["one_is_killed"]
    assert found["kept"]
    assert found["left"] == [0]
    assert found["written"][0] >= 2


def test_students_see_the_cache_as_it_was_or_as_it_is_to_be(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["read_while_it_grows"]
    assert found["seen"] == [[2, 1], [3, 2]]
    assert found["opened"] > 5


def test_nobody_waits_for_a_claim_and_the_next_run_does_what_it_left(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["nothing_to_claim"] | {"written": [7, 1], "left": [1, 0]} == outcomes["nothing_to_claim"]
    assert outcomes["nothing_to_claim"]["held"] == [1, 0]
    late = outcomes["the_last_claim_is_freed_late"]
    assert sum(late["written"]) == 8
    assert late["left"][1] == 0


def test_those_that_wait_end_with_a_whole_cache_also_if_others_are_killed(outcomes: dict[str, dict[str, Any]]) -> None:
    together = outcomes["those_that_wait_end_with_a_whole_cache"]
    assert together["left"] == [0, 0, 0]
    late = outcomes["one_waits_until_a_holder_is_killed"]
    assert late["waited"]
    assert (late["written"], late["left"]) == ([8], [0])
    assert outcomes["one_that_waits_is_stopped"]["code"] == 75


def test_precompute_that_waits_and_a_student_after_it_run_in_two_processes_at_once(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    assert outcomes["students_are_trained_as_soon_as_the_cache_is_whole"]["codes"] == [0, 0, -signal.SIGKILL]


def test_a_wait_ends_if_the_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.zarr"
    monkeypatch.setattr(StopFlag, "wait", lambda flag, seconds: seconds > 0 and shutil.rmtree(path))
    with pytest.raises(CacheError, match="Fix: check the path"):
        precompute(
            recipe(path, shard_rows=128), teachers={"t": Linear()}, dataset=Pixels(NUM_IMAGES), part="1/2", wait=True
        )


def test_a_part_alone_leaves_the_rest_to_others(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "c.zarr", shard_rows=128)
    images, modules = Pixels(NUM_IMAGES), {"t": Linear()}
    one = precompute(plan, teachers=modules, dataset=images, part="1/2")
    assert (one.shards, one.shards_written, one.shards_left) == (6, 3, 3)
    assert str(one.left) == "3 left to other parts"
    again = precompute(plan, teachers=modules, dataset=images, part="1/2")
    assert (again.shards_written, again.shards_left) == (0, 3)
    assert run(tmp_path / "c.zarr", images, shard_rows=128).shards_written == 3
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")


def test_a_file_system_without_locks_is_named_and_serves_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole(tmp_path / "w.zarr")

    def none(lock: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    console.configure()
    try:
        assert whole(tmp_path / "c.zarr") == expected
    finally:
        console.configure(quiet=True)
    assert "lies on a file system without file locks" in capsys.readouterr().err


def test_a_run_waits_while_another_prepares_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.zarr"
    # Not capsys: a line that is written while it reads is lost.
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    console.configure()
    try:
        with preparing(LocalStore(path)) as target:
            assert target == tmp_path / "c.zarr.creating"
            thread = threading.Thread(target=whole, args=(path,))
            thread.start()
            until(lambda: "waiting for another run" in errors.getvalue())
            assert not path.exists()
        thread.join(60)
        assert not thread.is_alive()
    finally:
        console.configure(quiet=True)
    assert contents(path) == whole(tmp_path / "w.zarr")
    assert sorted(os.listdir(tmp_path)) == ["c.zarr", "w.zarr"]


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is none of 1/N to N/N\. Fix"):
        parse_part(text)


def test_parts_are_read() -> None:
    assert parse_part("2/16") == (2, 16)
