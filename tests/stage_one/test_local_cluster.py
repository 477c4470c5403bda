"""A cluster of this machine, which the command starts and ends."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from logitcache.config.recipe import dump_recipe
from logitcache.errors import KilledWorkerError, RecipeError
from logitcache.stage_one.cluster import workers
from logitcache.stage_one.precompute import precompute
from tests.cache.made import Linear, contents, recipe, teacher
from tests.stage_one import dying
from tests.stage_one.apart import stopped
from tests.stage_one.test_cluster import named
from tests.stage_one.test_import_targets import KEPT, answered, imported, views, write_npz
from tests.stage_one.test_kill import num_records

pytestmark = pytest.mark.usefixtures("warm_workers")


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda = torch.device("cuda")
    assert workers._own(2, cuda) == [
        {"env": {"CUDA_VISIBLE_DEVICES": "0"}, "resources": {"GPU": 1}},
        {"env": {"CUDA_VISIBLE_DEVICES": "1"}, "resources": {"GPU": 1}},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [own["env"]["CUDA_VISIBLE_DEVICES"] for own in workers._own(2, cuda)] == ["5", "3"]
    assert workers._own(3, torch.device("cpu")) == [{}, {}, {}]
    with pytest.raises(RecipeError, match="--workers 3: each takes a GPU, and this machine shows 2"):
        workers._own(3, cuda)


Killing = Callable[[int], Path]


@pytest.fixture
def killing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Killing:
    """Have so many workers killed as they start; returns the folder in which each leaves a file."""

    def kill(count: int) -> Path:
        (folder := tmp_path / "killed").mkdir()
        variables = {dying.FOLDER: str(folder), dying.COUNT: str(count)}
        monkeypatch.setattr(workers, "_own", lambda number, device: [{"env": variables} for _ in range(number)])
        monkeypatch.setattr(workers, "PRELOAD", dying.__name__)
        return folder

    return kill


def test_workers_that_are_killed_while_they_start_are_started_again(killing: Killing, tmp_path: Path) -> None:
    killed = killing(3)
    result = precompute(named(tmp_path / "c.zarr"), workers=2)
    assert len(list(killed.iterdir())) >= 3
    assert (result.shards_written, result.shards_left) == (6, 0)
    precompute(named(tmp_path / "w.zarr"))
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "w.zarr")


def test_workers_that_never_start_end_the_run_which_can_go_on(
    killing: Killing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(1000)
    monkeypatch.setattr(workers, "STARTS", 1)
    with pytest.raises(KilledWorkerError, match=r"2 times in a row.* Fix: fewer --workers") as stopped:
        precompute(named(tmp_path / "c.zarr"), workers=1)
    assert stopped.value.exit_code == 75
    assert precompute(named(tmp_path / "c.zarr")).shards_left == 0


@pytest.mark.slow
def test_ctrl_c_stops_a_cluster_of_this_machine_and_the_command_continues(tmp_path: Path) -> None:
    cache = tmp_path / "c.zarr"
    slow = {"kind": "custom", "factory": "tests.stage_one.test_kill:slow"}
    plan = named(cache, teachers={"t": teacher(model=slow)}, batch_size=8, num_workers=1, start_method="fork")
    (tmp_path / "r.yaml").write_text(dump_recipe(plan))
    command = ["precompute", str(tmp_path / "r.yaml"), "--workers", "1"]
    code, errors = stopped(command, signal.SIGINT, lambda: num_records(cache))
    assert code == 130, errors
    assert "of the 6 shards that were to do are committed" in errors
    assert "--workers 1\n" in errors.partition("Resume: ")[2]
    assert "Traceback" not in errors
    records = num_records(cache)
    assert 1 <= records < 6
    quicker = {"batch_size": 128, "num_workers": 0}
    assert precompute(plan.model_copy(update=quicker)).shards_written == 6 - records
    precompute(plan.model_copy(update={**quicker, "cache": str(tmp_path / "w.zarr")}))
    assert contents(cache) == contents(tmp_path / "w.zarr")
    assert sorted(os.listdir(tmp_path)) == ["c.zarr", "r.yaml", "w.zarr"]


def test_workers_look_answers_up_in_files(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", answered(views(tmp_path / "v", tmp_path / "x.zarr"), Linear(16)))
    kept = {**KEPT, "teachers": {"t": teacher(model=imported(tmp_path / "a.npz"))}}
    result = precompute(recipe(tmp_path / "c.zarr", **kept), workers=1)
    assert (result.shards_written, result.shards_left, result.teacher_passes) == (6, 0, 0)
    precompute(recipe(tmp_path / "w.zarr", **kept))
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "w.zarr")


def test_workers_that_do_not_end_in_time_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import SpecCluster

    close = SpecCluster.close

    def late(cluster: SpecCluster, timeout: float | None = None) -> None:
        if cluster.status.name != "closed":
            close(cluster, timeout)
            raise TimeoutError

    monkeypatch.setattr(SpecCluster, "close", late)
    result = precompute(named(tmp_path / "c.zarr"), workers=1)
    assert result.shards_left == 0
