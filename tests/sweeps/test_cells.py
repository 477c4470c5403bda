"""Cells: what a grid makes, how runs are named, what is refused, and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli import main
from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import check_recipes, load_sweep
from logitcache.sweeps.cells import cells_of, members_of, parse_grid
from logitcache.sweeps.halving import num_survivors
from logitcache.sweeps.objectives import best, surpasses
from logitcache.sweeps.sweep import sweep
from logitcache.sweeps.sweep_recipe import SweepRecipe
from tests.student.small import LINEAR, fill, metrics, weights
from tests.sweeps.small import VALIDATION, alone, assert_same, run, swept


def names(**entries: Any) -> list[str]:
    student = {"cache": "c", "epochs": 2, "model": {"kind": "small_cnn"}} | entries.pop("student", {})
    return [cell.name for cell in cells_of(load_recipe({"kind": "sweep", "student": student} | entries, SweepRecipe))]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, ["student"]),
        ({"grid": {"optimizer.lr": [0.1, 1e-3]}}, ["lr=0.1", "lr=0.001"]),
        (
            {"grid": {"losses.0.temperature": [1, 2.5], "model.width": [4]}},
            ["temperature=1,width=4", "temperature=2.5,width=4"],
        ),
        (
            {"grid": {"losses.0.weight": [1], "losses.1.weight": [2]}},
            ["losses.0.weight=1,losses.1.weight=2"],
        ),
        ({"grid": {"a.b, c.d": {"small": [1, 2], "large": [3, 4]}}}, ["b=small", "b=large"]),
        (
            {"grid": {"losses": [[{"kind": "dkd"}], [{"kind": "dist"}, {"kind": "cross_entropy"}]]}},
            ["losses=dkd", "losses=dist+cross_entropy"],
        ),
        (
            {"grid": {"model": [{"kind": "timm", "name": "vit/tiny"}, {"kind": "small_cnn"}, {"kind": "small_cnn"}]}},
            ["model=vit_tiny", "model=small_cnn", "model=small_cnn_1"],
        ),
        ({"cells": {"labels": {"losses": [{"kind": "cross_entropy"}]}}}, ["labels"]),
        ({"grid": {"ema": [None, 0.9]}, "cells": {"other": {"epochs": 3}}}, ["ema=null", "ema=0.9", "other"]),
    ],
)
def test_cells_have_names_that_can_be_guessed(entries: dict[str, Any], expected: list[str]) -> None:
    assert names(**entries) == expected


def test_a_long_name_is_cut_and_stays_apart_from_others() -> None:
    found = names(grid={"losses.0.teacher": ["a" * 200, "a" * 201]})
    assert len(set(found)) == 2
    assert max(map(len, found)) <= 120


def test_keys_that_change_together_are_set_together(tmp_path: Path) -> None:
    student = {"losses": [{"kind": "kl_divergence"}, {"kind": "cross_entropy"}]}
    grid = {"losses.0.weight, losses.1.weight": [[0.9, 0.1], [0.5, 0.5]]}
    members = members_of(swept(tmp_path / "c", student=student, grid=grid, seeds=[3, 1]), tmp_path)
    assert [
        (m.run, m.seed, *(loss.weight.bounds[0] for loss in m.recipe.losses))  # type: ignore[union-attr]
        for m in members
    ] == [
        ("weight=0.9+0.1,seed=3", 3, 0.9, 0.1),
        ("weight=0.9+0.1,seed=1", 1, 0.9, 0.1),
        ("weight=0.5+0.5,seed=3", 3, 0.5, 0.5),
        ("weight=0.5+0.5,seed=1", 1, 0.5, 0.5),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"seed": [1, 2]}}, "seed is not for grid and cells to change.*Fix: `seeds`"),
        ({"cells": {"a": {"out": "x"}}}, "out is not for grid and cells"),
        ({"seeds": [1, 1]}, "seeds has one of them twice"),
        ({"seeds": 0}, "seeds"),
        ({"grid": {"epochs": []}}, "grid.epochs"),
        ({"halving": {"epochs": [3, 2]}}, "must ascend"),
        ({"halving": {"epochs": [2]}}, "less than the 2 epochs"),
        ({"student": {"epoch": 3}}, "student.epoch.*did you mean|epoch"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        swept(tmp_path, **entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"optimizer.lr": [1, -1], "ema": [2.0]}}, r"(?s)cell lr=1,ema=2: .*cell lr=-1,ema=2: .*2 mistakes"),
        ({"grid": {"losses.1.weight": [1]}}, "losses.*entries 0 to 0"),
        ({"grid": {"epochz": [1]}}, "cell epochz=1: .*unknown key"),
        ({"grid": {"a, b": [1]}}, "is no list of 2 values"),
        ({"baseline": "labels"}, "baseline 'labels' is no cell"),
        ({"grid": {"epochs": [1, 2]}, "cells": {"epochs=1": {}}}, "cells of the same name: epochs=1"),
    ],
)
def test_every_cell_that_is_no_recipe_is_listed_before_anything_trains(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    student = {"losses": [{"kind": "kl_divergence"}]}
    with pytest.raises(RecipeError, match=message):
        sweep(swept(tmp_path / "no cache", student=student, **entries), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_that_the_encoding_does_not_serve_are_refused_and_others_trained(tmp_path: Path) -> None:
    cache = fill(tmp_path / "cache", logits={"kind": "top_k", "k": 2})
    cells = {"labels": {"losses": [{"kind": "cross_entropy"}]}, "raw": {"losses": [{"kind": "dist"}]}}
    result = run(cache, tmp_path / "out", grid={"losses.0.temperature": [1]}, cells=cells)
    assert set(result.failed) == {"temperature=1,seed=0", "raw,seed=0"}
    assert "nats at T = 1" in result.failed["temperature=1,seed=0"]
    assert result.exit_code == 4
    errors = {row.cell: row.target_error for row in result.comparison.rows}
    assert errors["temperature=1"] is not None
    assert errors["temperature=1"] > 0.01
    assert errors["labels"] is None
    warned = run(cache, tmp_path / "out", grid={"losses.0.temperature": [1]}, cells=cells, inexact_targets="warn")
    assert set(warned.failed) == {"raw,seed=0"}


def test_a_cache_that_does_not_open_fails_its_cells_alone(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "out", grid={"cache": {"there": str(cache), "gone": str(tmp_path / "none")}})
    assert list(result.failed) == ["cache=gone,seed=0"]
    assert (result.finished, result.exit_code) == (1, 3)


def test_halving_lets_the_better_cells_go_on_as_if_never_paused(cache: Path, tmp_path: Path) -> None:
    student = {"validation": VALIDATION, "epochs": 3, "model": LINEAR, "optimizer": {"kind": "sgd"}}
    grid = {"optimizer.lr": [1e-6, 1e-5, 0.01, 0.1]}
    halving = {"epochs": [1, 2], "keep": 0.5, "metrics": ["val_top1", "-loss"]}
    result = run(cache, tmp_path / "out", student=student, grid=grid, halving=halving, seeds=2)
    epochs = {path.name: len(metrics(path)) for path in (tmp_path / "out/runs").iterdir()}
    cells = {name.split(",")[0]: set() for name in epochs}
    for name, count in epochs.items():
        cells[name.split(",")[0]].add(count)
    assert sorted(map(sorted, cells.values())) == [[1], [1], [2], [3]]
    assert (result.finished, len(result.stopped)) == (2, 6)
    (winner,) = {name for name, count in epochs.items() if count == 3 and name.endswith("seed=0")}
    alone(tmp_path / "out/runs" / winner, tmp_path / "alone")
    assert_same(tmp_path / "out/runs" / winner, tmp_path / "alone")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")}
    assert run(cache, tmp_path / "out", student=student, grid=grid, halving=halving, seeds=2).finished == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")} == before


def test_a_metric_that_was_not_measured_is_an_error_that_names_those_that_were(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"val_top1 was not measured in epoch 0 of .*'loss'"):
        run(cache, tmp_path / "out", grid={"epochs": [2, 3]}, halving={"epochs": [1]})


def test_the_best_of_several_scores_go_front_by_front() -> None:
    scores = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.5, 0.5), "d": (0.4, 0.4), "e": (0.9, 0.05)}
    assert surpasses(scores["c"], scores["d"])
    assert not surpasses(scores["a"], scores["b"])
    assert set(best(scores, 4)) == {"a", "b", "c", "e"}
    assert set(best(scores, 2)) == {"a", "b"}, "the ends of the front come first"
    assert best({name: (own[0],) for name, own in scores.items()}, 3) == ["a", "e", "c"]
    assert best(dict.fromkeys("abcd", (1.0, 2.0)), 2) == ["a", "b"], "equal ones in their order"


def test_the_command_line_varies_a_students_recipe(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"cache": str(cache), "out": "runs/s", "model": LINEAR, "epochs": 1, "num_workers": 0, "device": "cpu"}
    del entries["out"]  # a student's own folder has no effect in a sweep, and need not be there
    (tmp_path / "s.yaml").write_text(json.dumps(entries))
    line = ["sweep", str(tmp_path / "s.yaml"), str(tmp_path / "out"), "--set", "order_seed=0", "--seeds", "3"]
    line += ["--grid", "losses.0.temperature=1,2", "--baseline", "temperature=2"]
    assert main([*line, "--set", "losses=[{kind: kl_divergence}]", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["finished"], document["comparison"]["baseline"]) == (6, "temperature=2")
    assert document["images_trained"] == 6 * 200 == 6 * document["images_rendered"]
    assert main([*line, "--set", "losses=[{kind: kl_divergence}]", "--table", "csv"]) == 0
    assert capsys.readouterr().out.startswith("cell,seeds,target_error,loss_mean,loss_deviation,")
    found = load_sweep(tmp_path / "out/sweep.yaml")
    assert found.grid == {"losses.0.temperature": [1, 2]}
    assert (found.seeds, found.student.order_seed) == (3, 0)
    assert len({weights(path) for path in (tmp_path / "out/runs").iterdir()}) == 6


def test_grids_of_the_command_line_are_yaml() -> None:
    assert parse_grid(["a.b=1,2.5,null", "model={kind: small_cnn},{kind: timm, name: x}"]) == {
        "a.b": [1, 2.5, None],
        "model": [{"kind": "small_cnn"}, {"kind": "timm", "name": "x"}],
    }
    for text in ("a.b", "a.b=", "=1", "a=[1"):
        with pytest.raises(RecipeError, match=r"--grid .*write KEY=V1,V2"):
            parse_grid([text])
    with pytest.raises(RecipeError, match=r"--grid a=3: a is given twice. Fix: all of its values in one --grid"):
        parse_grid(["a=1,2", "a=3"])


@pytest.mark.parametrize(
    ("count", "keep", "expected"), [(100, 0.07, 7), (20, 0.55, 11), (9, 1 / 3, 3), (10, 1 / 3, 4), (2, 0.01, 1)]
)
def test_the_share_of_cells_that_goes_on_is_rounded_up(count: int, keep: float, expected: int) -> None:
    assert num_survivors(count, keep) == expected


def test_recipe_check_finds_the_mistakes_of_cells(cache: Path, tmp_path: Path) -> None:
    recipe = {"kind": "sweep", "student": {"cache": str(cache), "epochs": 1, "model": LINEAR}}
    sound, wrong = tmp_path / "sound.yaml", tmp_path / "wrong.yaml"
    sound.write_text(json.dumps(recipe | {"grid": {"optimizer.lr": [0.1]}}))
    wrong.write_text(json.dumps(recipe | {"grid": {"losses": [[{"kind": "srrl", "student": "0", "feature": "f"}]]}}))
    checked = check_recipes([sound, wrong])
    assert [one.command for one in checked] == ["sweep", "sweep"]
    assert checked[0].error is None
    assert "feature 'f'" in str(checked[1].error)


def test_under_torchrun_a_sweep_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="Fix: --workers N"):
        run(cache, tmp_path)
