"""The table of losses: every loss has a row, one cache serves them all, and pieces make the same table as the whole."""

import importlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.student.compatibility import require_served
from logitcache.student.losses import Loss
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training_recipes import StudentRecipe

ROOT = Path(__file__).parents[2]
FOR_SEVERAL_LABELS = {"binary_cross_entropy", "multi_label_kl"}
FEW = ["--limit", "20", "--epochs", "1", "--seeds", "2", "--losses", "labels,dist", "--json"]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    """Import the benchmark, which is a script and imports another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("losses")


def result(top1: float, best: float) -> RunResult:
    """Make what a run measured."""
    return RunResult("", 1, 1, 1, 1.0, 1, 1.0, top1, None, best, None, 0)


def test_every_loss_for_single_labels_has_a_row(table: ModuleType) -> None:
    kinds = {loss.model_fields["kind"].default for loss in get_args(get_args(Loss)[0])}
    assert {loss["kind"] for losses in table.ROWS.values() for loss in losses} == kinds - FOR_SEVERAL_LABELS


def test_one_cache_serves_every_row(table: ModuleType, tmp_path: Path) -> None:
    cache = table.fill_cache(table.parse([*FEW, "--out", str(tmp_path)]))
    for losses in table.ROWS.values():
        recipe = load_recipe(
            ROOT / "pipelines" / "losses" / "student.yaml", StudentRecipe, [f"losses={json.dumps(losses)}"]
        )
        require_served(recipe.losses, open_cache(cache))


def test_gain_is_paired_by_seed(table: ModuleType) -> None:
    plain, better = [0.80, 0.84, 0.82], [0.83, 0.85, 0.84]
    runs = {
        name: {seed: result(top1, top1 + 0.01) for seed, top1 in enumerate(values)}
        for name, values in (("labels", plain), ("dist", better))
    }
    labels, dist = table.tabulate(runs)
    gains = 100 * (np.array(better) - np.array(plain))
    assert dist["gain"] == {"mean": round(gains.mean(), 2), "std": round(gains.std(ddof=1), 2)}
    assert dist["last"]["std"] == round(100 * statistics.stdev(better), 2)
    assert dist["best"]["mean"] == 85.0
    assert labels["gain"] is None


def test_setting_says_what_the_recipe_says(table: ModuleType) -> None:
    losses = [table.labels(0.1), table.vectors("crd", 0.8, size=16), table.maps("hint", 100)]
    assert table.setting(losses) == "0.1 cross_entropy + 0.8 crd(penultimate, size 16) + 100 hint(maps)"


def test_parts_make_the_whole_and_no_run_is_trained_twice(
    table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*options: str) -> list[dict[str, Any]]:
        assert table.main([*FEW, "--out", str(tmp_path), *options]) == 0
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
        return found

    trained = [(row["loss"], seed) for part in ("1/2", "2/2") for row in rows("--part", part) for seed in row["seeds"]]
    assert sorted(trained) == [("dist", 0), ("dist", 1), ("labels", 0), ("labels", 1)]
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint.pt")}
    whole = rows()
    assert [(row["loss"], row["seeds"]) for row in whole] == [("labels", [0, 1]), ("dist", [0, 1])]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint.pt")} == checkpoints


def test_wrong_names_and_parts_are_refused(
    table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        table.main(["--losses", "labels,dits"])
    assert "['dits'] are not among labels, " in capsys.readouterr().err
    assert table.main([*FEW, "--out", str(tmp_path), "--part", "3/2"]) == 2
    assert "--part 1/8" in capsys.readouterr().err
