"""benchmarks/compare_checkouts.py finds any byte that differs, and lets times differ."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
METRICS = {"epoch": 0, "loss": 0.5, "top1": float("nan"), "seconds": 1.25}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Import the benchmark, which is a script and imports another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("compare_checkouts")


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """Write what a run and a cache hold, twice."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "c.zarr" / "logits").mkdir(parents=True)
    (old / "c.zarr" / "logits" / "c.0.0").write_bytes(bytes(range(200)))
    (old / "c.zarr" / "zarr.json").write_text(json.dumps({"shape": [2, 3], "seed": 0}))
    (old / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    (old / "metrics.csv").write_text("epoch,loss,seconds\n0,0.5,1.25\n")
    (old / "weights.safetensors").write_bytes(b"weights")
    shutil.copytree(old, new)
    return old, new


def test_equal_trees_pass(script: ModuleType, trees: tuple[Path, Path]) -> None:
    assert script.compare_folders(*trees) is None


def test_times_may_differ(script: ModuleType, trees: tuple[Path, Path]) -> None:
    (trees[1] / "metrics.jsonl").write_text(json.dumps(METRICS | {"seconds": 9.5}) + "\n")
    (trees[1] / "metrics.csv").write_text("epoch,loss,seconds\n0,0.5,9.75\n")
    assert script.compare_folders(*trees) is None


def _flip_a_bit(root: Path) -> None:
    shard = root / "c.zarr" / "logits" / "c.0.0"
    data = bytearray(shard.read_bytes())
    data[137] ^= 1
    shard.write_bytes(data)


def _reorder_keys(root: Path) -> None:
    (root / "c.zarr" / "zarr.json").write_text(json.dumps({"seed": 0, "shape": [2, 3]}))


def _reformat(root: Path) -> None:
    (root / "c.zarr" / "zarr.json").write_text('{"shape":[2,3],"seed":0}')


def _change_the_last_digit(root: Path) -> None:
    (root / "metrics.jsonl").write_text(json.dumps(METRICS | {"loss": 0.5000000000000001}) + "\n")


def _append(root: Path) -> None:
    with open(root / "weights.safetensors", "ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_flip_a_bit, "c.zarr/logits/c.0.0: differs at byte 137 of 200"),
        (_reorder_keys, "c.zarr/zarr.json:  has the keys ['shape', 'seed'], then ['seed', 'shape']"),
        (_reformat, "c.zarr/zarr.json: 28 bytes, then 24"),
        (_change_the_last_digit, "metrics.jsonl: [0].loss is 0.5, then 0.5000000000000001"),
        (_append, "weights.safetensors: 7 bytes, then 8"),
        (lambda root: (root / "metrics.csv").unlink(), "metrics.csv: only in OLD"),
        (lambda root: (root / "best.safetensors").touch(), "best.safetensors: only in NEW"),
    ],
)
def test_a_difference_is_found(
    script: ModuleType, trees: tuple[Path, Path], change: Callable[[Path], None], difference: str
) -> None:
    change(trees[1])
    assert script.compare_folders(*trees) == difference


def test_jobs_that_wrote_nothing_are_not_equal(script: ModuleType, tmp_path: Path) -> None:
    assert script.compare_folders(tmp_path / "old", tmp_path / "new") == "no file was written"


def test_every_shipped_recipe_is_compared(script: ModuleType) -> None:
    jobs = script.selected("", False)
    script.require_every_recipe(ROOT, jobs)
    with pytest.raises(SystemExit, match=r"runs cifar/student\.yaml$"):
        script.require_every_recipe(ROOT, [job for job in jobs if job.recipe != "cifar/student.yaml"])


def test_a_recipe_is_run_after_those_whose_results_it_reads(script: ModuleType) -> None:
    assert [job.name for job in script.selected("derive/recipe", False)] == [
        "self_distillation/teacher.yaml",
        "derive/precompute.yaml",
        "derive/recipe.yaml",
    ]
