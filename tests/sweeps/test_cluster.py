"""Sweeps on a cluster: whoever trains a group, the bytes are those of one process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import RecipeError
from logitcache.stage_one.cluster import workers
from logitcache.stage_one.cluster.cluster import Cluster
from logitcache.sweeps import cluster as sweep_cluster
from logitcache.sweeps.sweep import SweepResult, sweep
from tests.student.small import DROPOUT, LINEAR
from tests.sweeps.small import CODE, assert_same, swept

pytestmark = pytest.mark.usefixtures("warm_workers")

IMAGES = {"dataset": {"kind": "bundled", "split": "test", "num_images": 40}, "batch_size": 40}
SWEEP: dict[str, Any] = {
    "student": {"model": LINEAR, "validation": IMAGES, "optimizer": {"kind": "sgd"}},
    "grid": {"optimizer.lr": [1e-3, 1e-2, 0.1]},
    "cells": {
        "dropout": {"model": DROPOUT},
        "mine": {"model": CODE | {"factory": CODE["factory"] + "failing", "arguments": {"at": 3}}},
    },
    "halving": {"epochs": [1], "keep": 0.5},
    "group_size": 2,
}


def spread(cache: Path, out: Path, cluster: Cluster = Cluster(), **changes: Any) -> SweepResult:  # noqa: B008
    return sweep(swept(cache, **(SWEEP | changes)), out, cluster)


@pytest.fixture(scope="module")
def here(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    """The sweep of one process."""
    out = tmp_path_factory.mktemp("here")
    return out, spread(cache, out)


@pytest.fixture
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each of two workers one thread, as this process has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})


@pytest.fixture(scope="module")
def scheduler(warm_workers: None) -> Iterator[str]:
    """A cluster of two processes that the sweep has not started."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "preload": [workers.PRELOAD]}
    with distributed.LocalCluster(host="127.0.0.1", dashboard_address=None, **options) as cluster:
        with distributed.Client(cluster) as client:
            client.run(torch.set_num_threads, 1)  # as this process has: rounding depends on it
        yield cluster.scheduler_address


def assert_alike(out: Path, result: SweepResult, here: tuple[Path, SweepResult]) -> None:
    alone, expected = here
    assert {path.name for path in (out / "runs").iterdir()} == {path.name for path in (alone / "runs").iterdir()}
    for one in (alone / "runs").iterdir():
        if (one / "weights.safetensors").exists():
            assert_same(out / "runs" / one.name, one)
    assert (result.finished, result.stopped) == (expected.finished, expected.stopped)
    assert (result.comparison, result.exit_code) == (expected.comparison, expected.exit_code)
    assert (result.images_rendered, result.images_trained) == (expected.images_rendered, expected.images_trained)
    assert list(result.failed) == list(expected.failed) == ["mine,seed=0"]
    assert json.loads((out / "runs/mine,seed=0/failure.json").read_text())["error"] == "ZeroDivisionError"
    assert not list(out.rglob("group.json")), "none was killed"


@pytest.mark.usefixtures("_two_cores")
def test_workers_of_this_machine_write_what_one_process_writes(
    cache: Path, tmp_path: Path, here: tuple[Path, SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    start = sweep_cluster.running
    monkeypatch.setattr(sweep_cluster, "running", lambda *args: (starts.append(1), start(*args))[1])
    result = spread(cache, tmp_path, Cluster(workers=2))
    assert_alike(tmp_path, result, here)
    assert len(starts) == 1, "once for all rungs"


def test_workers_of_a_scheduler_write_what_one_process_writes_and_nothing_twice(
    cache: Path, tmp_path: Path, here: tuple[Path, SweepResult], scheduler: str
) -> None:
    assert_alike(tmp_path, spread(cache, tmp_path, Cluster(scheduler)), here)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")}
    again = spread(cache, tmp_path, Cluster(scheduler))
    assert again.finished == here[1].finished
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")} == before


def test_a_search_spreads_its_trials(cache: Path, tmp_path: Path, scheduler: str) -> None:
    search = {"kind": "random", "space": {"optimizer.lr": [1e-3, 1e-2, 0.1]}, "trials": 4, "batch": 2}
    changes = {"grid": {}, "cells": {}, "halving": None, "group_size": 1, "search": search}
    found = [
        spread(cache, tmp_path / str(n), cluster, **changes)
        for n, cluster in enumerate((Cluster(scheduler), Cluster()))
    ]
    assert found[0].trials == found[1].trials
    assert {trial.state for trial in found[0].trials} == {"finished"}


def test_a_sweep_on_two_clusters_or_on_none_that_answers_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Fix: --scheduler or --workers"):
        spread(cache, tmp_path, Cluster("tcp://127.0.0.1:1", 2))
    with pytest.raises(RecipeError, match="--scheduler 'nonsense:': "):
        spread(cache, tmp_path, Cluster("nonsense:"))
