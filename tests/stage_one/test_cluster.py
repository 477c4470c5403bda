"""Stage one on Dask: whatever dies, the bytes are those of one process."""

import multiprocessing
import pickle
import re
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from logitcache.cache.write.writer_locks import Claim
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import CacheError, DataError, MismatchError, MissingExtraError, RecipeError, Stopped
from logitcache.runtime.console import configure
from logitcache.runtime.stopping import StopFlag
from logitcache.stage_one import claims
from logitcache.stage_one import precompute as module
from logitcache.stage_one.claims import Claims
from logitcache.stage_one.cluster import fill_on_cluster
from logitcache.stage_one.cluster.fill_on_cluster import TaskOpener, shard_filler
from logitcache.stage_one.cluster.workers import call, located, release
from logitcache.stage_one.inputs import open_inputs
from logitcache.stage_one.lifecycle import begun
from logitcache.stage_one.loop import Done
from logitcache.stage_one.precompute import PrecomputeRecipe, open_precompute_task, precompute
from logitcache.stage_one.todo import Todo, find_todo
from tests.cache.made import PACKED, Linear, Pixels, contents, recipe, teacher
from tests.stage_one.apart import program
from tests.stage_one.clustered import NUM_SHARDS
from tests.stage_one.runs import NUM_IMAGES, whole


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = program("clustered", tmp_path_factory.mktemp("clustered"))
    return found


def test_a_cluster_that_loses_two_workers_and_its_scheduler_writes_what_one_process_writes(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    found = outcomes["loses_two_workers_and_its_scheduler"]
    assert found["identical"]
    assert found["beside"] == ["c.zarr"]
    assert found["results"][0]["shards_left"] == 0
    assert 9 <= found["seen"] < NUM_SHARDS


def test_a_client_that_is_killed_may_be_started_again_and_does_no_shard_twice(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    found = outcomes["client_is_killed"]
    assert found["identical"]
    assert found["beside"] == ["c.zarr"]
    assert found["kept"] >= 6
    assert found["results"][0]["shards_left"] == 0


def test_clients_of_one_recipe_share_the_tasks(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["two_clients"]
    assert found["identical"]
    assert [result["shards_left"] for result in found["results"]] == [0, 0]


def test_every_process_builds_its_teachers_once(outcomes: dict[str, dict[str, Any]]) -> None:
    # A scheduler, then four workers and two more; the client builds them too.
    assert outcomes["loses_two_workers_and_its_scheduler"]["built"] == [1] * 7
    assert outcomes["two_clients"]["built"] == [1] * 4


def test_workers_with_gpus_get_the_work_where_there_are_any_and_views_that_share_decodes_come_together(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    found = outcomes["grows_on_the_worker_with_a_gpu"]
    assert found["only_gpu"]
    [result] = found["results"]
    assert (result["shards"], result["shards_written"], result["shards_left"]) == (NUM_SHARDS, 15, 0)


def test_a_users_error_reaches_the_client_as_it_is_and_is_not_tried_again(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["errors"]
    error = found["users"]
    assert (error["error"], error["exit_code"]) == ("DataError", 2)
    assert "answers image '00160' with inf or nan (logits)" in error["message"]
    assert re.search(r"\n  On worker: tcp://127\.0\.0\.1:\d+, \S+, process \d+$", error["message"])
    assert found["overflowed"] == 1


def test_any_other_error_is_tried_again(outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes["errors"]
    assert found["failed"] == 1
    assert (found["others"]["shards"], found["others"]["shards_left"]) == (5, 0)


def named(path: Path, **changes: Any) -> PrecomputeRecipe:
    """Return a recipe that names its teacher and its images."""
    made = {"kind": "custom", "factory": "tests.cache.made:Linear"}
    pixels = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": NUM_IMAGES}}
    return recipe(path, **({"dataset": pixels, "teachers": {"t": teacher(model=made)}, "shard_rows": 128} | changes))


class Prepared(NamedTuple):
    recipe: PrecomputeRecipe
    todo: Todo

    def changed(self, recipe: PrecomputeRecipe) -> "Prepared":
        return Prepared(recipe, self.todo)


def prepared(path: Path, **changes: Any) -> Prepared:
    """Prepare a cache, and return what is to do to it."""
    wanted = named(path, **changes)
    with open_inputs(wanted) as inputs, begun(inputs.store, lambda: find_todo(inputs)) as todo:
        return Prepared(wanted, todo)


@pytest.fixture(autouse=True)
def _released() -> Any:
    yield
    release("key")


def computed(work: Prepared, shards: int = 6) -> Any:
    opened = partial(open_precompute_task, work.recipe, work.todo.goal, work.todo.num_recorded)
    opener = partial(shard_filler, TaskOpener("precompute", work.recipe, opened))
    return call("key", pickle.dumps(opener), None, work.todo.shards[:shards])


def test_a_task_keeps_the_outputs_that_the_recipe_chooses(tmp_path: Path) -> None:
    made = {"kind": "custom", "factory": "tests.cache.made:Linear"}
    chosen = {"teachers": {"t": teacher(PACKED, model=made, classes=[9, 3, 12])}}
    work = prepared(tmp_path / "c.zarr", **chosen)
    assert computed(work)[0].shards == 6
    assert precompute(work.recipe).shards_written == 0
    precompute(named(tmp_path / "w.zarr", **chosen))
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "w.zarr")


def test_a_task_writes_its_shards_and_again_does_nothing(tmp_path: Path) -> None:
    work = prepared(tmp_path / "c.zarr")
    assert computed(work, 2) == (Done(2, 256, 256), work.todo.shards[:2])
    assert computed(work, 2)[0] == Done()
    assert computed(work)[0] == Done(4, 344, 344)
    assert precompute(work.recipe).shards_written == 0
    precompute(named(tmp_path / "w.zarr"))
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "w.zarr")


def test_a_shard_that_another_process_has_is_waited_for_but_not_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prepared(tmp_path / "c.zarr")
    monkeypatch.setattr(fill_on_cluster, "PATIENCE", 0.3)
    claim = Claim(work.todo.store, work.todo.shards[1])
    assert claim.take()
    done, committed = computed(work, 2)
    assert (done.shards, committed) == (1, work.todo.shards[:1])
    claim.release()
    assert computed(work, 2)[0].shards == 1


def refused(work: Prepared, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        raise computed(work)


def test_a_worker_that_sees_no_cache_or_another_is_refused(tmp_path: Path) -> None:
    work = prepared(tmp_path / "c.zarr")
    none, other = named(tmp_path / "none.zarr"), named(tmp_path / "other.zarr")
    refused(work.changed(none), CacheError, "does not exist(.|\n)*Fix: a file system that")
    whole(tmp_path / "other.zarr", Pixels(NUM_IMAGES, seed=1))
    refused(work.changed(other), MismatchError, "another cache here than at the client")


def test_a_worker_with_other_images_or_weights_is_refused(tmp_path: Path) -> None:
    work = prepared(tmp_path / "c.zarr")
    others = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": NUM_IMAGES, "seed": 1}}
    refused(work.changed(named(tmp_path / "c.zarr", dataset=others)), MismatchError, "was made from other images")
    model = {"kind": "custom", "factory": "tests.cache.made:Linear", "arguments": {"seed": 1}}
    changed = named(tmp_path / "c.zarr", teachers={"t": teacher(model=model)})
    refused(work.changed(changed), MismatchError, r"teachers\.t: its weights are \w{8}… here, and \w{8}… at")


def test_a_worker_that_may_start_no_processes_says_how_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = prepared(tmp_path / "c.zarr", num_workers=1)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    refused(work, RecipeError, "num_workers is 1(.|\n)*Fix: start workers with `dask worker --no-nanny`")


@pytest.mark.parametrize("error", [DataError("a"), MissingExtraError("a", "timm"), Stopped("a", signal.SIGTERM)])
def test_users_errors_of_any_class_travel(error: Any) -> None:
    travelled = pickle.loads(pickle.dumps(located(error)))
    assert type(travelled) is type(error)
    assert str(travelled).startswith(f"{error}\n  On worker: ")


def test_objects_and_ambiguous_clusters_are_refused(tmp_path: Path) -> None:
    lacking = recipe(tmp_path / "c.zarr")
    with pytest.raises(RecipeError, match=r"does not name dataset, teachers\.t\.model(.|\n)*Fix: name them"):
        precompute(lacking, workers=1)
    with pytest.raises(RecipeError, match="Fix: --scheduler or --workers"):
        precompute(named(tmp_path / "c.zarr"), scheduler="tcp://127.0.0.1:1", workers=2)
    with pytest.raises(RecipeError, match=r"does not name dataset, teachers\.t\.model: "):
        precompute(named(tmp_path / "c.zarr"), teachers={"t": Linear()}, dataset=Pixels(NUM_IMAGES), workers=1)
    assert not (tmp_path / "c.zarr").exists()


def test_a_cache_that_is_complete_needs_no_cluster(tmp_path: Path) -> None:
    precompute(named(tmp_path / "c.zarr"))
    found = precompute(named(tmp_path / "c.zarr"), scheduler="tcp://127.0.0.1:1")
    assert (found.shards_written, found.shards_left) == (0, 0)


@pytest.mark.parametrize("address", ["localhost", "smoke://signals:1"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--scheduler .* Fix: an address as in tcp://host:8786"):
        precompute(named(tmp_path / "c.zarr"), scheduler=address)


def test_a_scheduler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_on_cluster, "FIRST", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RecipeError, match=f"no scheduler answers at {address}"):
        precompute(named(tmp_path / "c.zarr"), scheduler=address)
    assert precompute(named(tmp_path / "c.zarr")).shards_written == 6


def test_shards_that_workers_commit_elsewhere_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = prepared(tmp_path / "c.zarr")
    monkeypatch.setattr(fill_on_cluster, "VISIBLE", 0.2)
    todo = work.todo
    with pytest.raises(CacheError, match=r"committed view 0 rows 0\.\.128 to .*Fix: a file system that client and"):
        fill_on_cluster._require_visible(todo.shards[:1], todo, Claims(todo.snapshot, todo.shards), time.sleep)


@pytest.mark.usefixtures("warm_workers")
def test_a_cluster_waits_for_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = named(tmp_path / "c.zarr")
    precompute(plan, part="2/2")
    real = StopFlag.wait

    def wait(flag: StopFlag, seconds: float) -> bool:
        if seconds == claims.POLL:
            with monkeypatch.context() as patch:
                patch.setattr(StopFlag, "wait", real)
                precompute(plan, part="1/2")
        return False

    monkeypatch.setattr(StopFlag, "wait", wait)
    found = precompute(plan, workers=1, part="2/2", wait=True)
    assert (found.shards, found.shards_written, found.shards_left) == (6, 0, 0)


def test_the_options_reach_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(plan: PrecomputeRecipe, **given: Any) -> Any:
        seen.append(given)
        return replace(precompute(plan), shards_left=0)

    monkeypatch.setattr(module, "precompute", run)
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(named(tmp_path / "c.zarr")))
    try:
        assert main(["precompute", str(file), "--workers", "2", "--part", "1/2", "--wait"]) == 0
        assert main(["precompute", str(file), "--scheduler", "tcp://a:1"]) == 0
        assert main(["precompute", str(file), "--workers", "0"]) == 2
    finally:
        configure(quiet=True)
    assert seen == [
        {"scheduler": None, "workers": 2, "part": "1/2", "wait": True},
        {"scheduler": "tcp://a:1", "workers": None, "part": None, "wait": False},
    ]
