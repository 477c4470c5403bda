"""What docs/how-to/run-on-a-cluster.md shows, as far as it can be tried on one machine."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from logitcache.config.recipe import load_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "how-to" / "run-on-a-cluster.md").read_text()
RECIPE = "pipelines/imagenet/precompute.yaml"


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    overrides = [f"cache={tmp_path}/caches/fashion_mnist/train.zarr", "dataset.num_images=20", "num_workers=0"]
    precompute(load_recipe(ROOT / "pipelines/fashion_mnist/precompute.yaml", PrecomputeRecipe, overrides))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "run-on-a-cluster.md", "exec"), found)
    assert found["best"].shape == (16,)


def test_a_job_of_an_array_takes_its_part_and_its_options(tmp_path: Path) -> None:
    stand_in = tmp_path / "logitcache"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "pipelines/slurm/array.sbatch"), RECIPE, "--set", "batch_size=8"]
    done = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["precompute", RECIPE, "--set", "batch_size=8", "--part", "3/8"]


def test_the_jobs_of_dask_jobqueue_are_what_the_page_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Stub:
        scheduler_address = "tcp://head:1"

        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

        def scale(self, jobs: int) -> None:
            asked["jobs"] = jobs

    module = ModuleType("dask_jobqueue")
    module.SLURMCluster = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_jobqueue", module)
    monkeypatch.setattr(
        "logitcache.stage_one.precompute.precompute", lambda plan, scheduler: asked.update(scheduler=scheduler)
    )
    monkeypatch.setattr("logitcache.runtime.console.configure", lambda: None)
    monkeypatch.setattr("sys.argv", ["dask_cluster.py", str(ROOT / RECIPE), "--jobs", "3", "--queue", "gpu"])
    runpy.run_path(str(ROOT / "pipelines/slurm/dask_cluster.py"), run_name="__main__")
    assert (asked["jobs"], asked["queue"], asked["scheduler"]) == (3, "gpu", "tcp://head:1")
    assert (asked["cores"], asked["processes"], asked["worker_extra_args"]) == (1, 1, ["--resources", "GPU=1"])
    assert asked["nanny"] is False


def test_the_workers_of_kubernetes_are_what_the_page_asks_for() -> None:
    spec = yaml.safe_load((ROOT / "pipelines/kubernetes/cluster.yml").read_text())
    [worker] = spec["spec"]["worker"]["spec"]["containers"]
    arguments = " ".join(worker["args"])
    assert all(part in arguments for part in ("--no-nanny", "--nthreads 1", "--memory-limit 0", "--resources GPU=1"))
    job = yaml.safe_load((ROOT / "pipelines/kubernetes/precompute.yml").read_text())
    [client] = job["spec"]["template"]["spec"]["containers"]
    assert client["command"][:2] == ["logitcache", "precompute"]
    assert f"tcp://{spec['metadata']['name']}-scheduler:8786" in client["command"]
