"""Searches: trials train on one stream, nothing is trained or told twice, and the best are compared by fresh seeds."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli import main
from logitcache.errors import MissingExtraError, RecipeError
from logitcache.report.recipe_check import check_recipes, load_sweep
from logitcache.student.learner import Learner
from tests.student.small import LINEAR, UNLABELLED, fill, metrics
from tests.sweeps.small import CODE, KINDS, STUDENT, alone, assert_same, run_of, searched, swept


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("weights.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
def test_trials_are_ordinary_students_of_one_stream(kind: str, cache: Path, tmp_path: Path) -> None:
    result = searched(cache, tmp_path / "out", kind, student={"order_seed": 0}, seeds=2)
    assert [trial.trial for trial in result.trials] == [0, 1, 2, 3]
    assert {trial.state for trial in result.trials} == {"finished"}
    assert (result.images_rendered, result.images_trained) == (2 * 2 * 200, 2 * 2 * 4 * 200), "a stream for each batch"
    for trial in result.trials:
        found = [metrics(run_of(tmp_path / "out", trial, seed))[-1]["val_top1"] for seed in (0, 1)]
        assert trial.values == {"accuracy": pytest.approx(statistics.fmean(found))}
    best = max(trial.values["accuracy"] for trial in result.trials)
    assert [trial.is_front for trial in result.trials] == [t.values["accuracy"] == best for t in result.trials]
    one = run_of(tmp_path / "out", result.trials[3], 1)
    alone(one, tmp_path / "alone")
    assert_same(one, tmp_path / "alone")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_search_trains_nothing_and_a_longer_one_only_what_is_new(
    kind: str, cache: Path, tmp_path: Path
) -> None:
    first = searched(cache, tmp_path, kind)
    before = times(tmp_path)
    assert searched(cache, tmp_path, kind).trials == first.trials
    assert times(tmp_path) == before
    longer = searched(cache, tmp_path, kind, trials=5)
    assert longer.images_rendered == first.images_rendered + 2 * 200
    assert {path: times(tmp_path)[path] for path in before} == before
    assert [trial.values for trial in longer.trials[:4]] == [trial.values for trial in first.trials]


def test_a_point_that_comes_up_again_is_trained_once(cache: Path, tmp_path: Path) -> None:
    result = searched(cache, tmp_path, space={"ema": [0.5]}, trials=5)
    assert result.students == 1
    assert result.images_trained == 2 * 200
    assert {trial.cell for trial in result.trials} == {"trial=0,ema=0.5"}
    assert len({trial.values["accuracy"] for trial in result.trials}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_trained_afresh_beside_the_baseline(kind: str, cache: Path, tmp_path: Path) -> None:
    cells = {"labels": {"losses": [{"kind": "cross_entropy"}]}}
    finalists = {"seeds": 3, "count": 2}
    result = searched(
        cache, tmp_path, kind, finalists=finalists, cells=cells, baseline="labels", student={"order_seed": 0}
    )
    ordered = sorted(result.trials, key=lambda trial: -trial.values["accuracy"])
    rows = {row.cell: row for row in result.comparison.rows}
    assert set(rows) == {"labels", ordered[0].cell, ordered[1].cell}
    assert (result.comparison.baseline, result.comparison.comparisons) == ("labels", 2)
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    for seed in (1, 2, 3):
        assert {f"{cell},seed={seed}" for cell in rows} <= folders
    assert "labels,seed=0" not in folders, "the search has seen seed 0"
    for cell, row in rows.items():
        found = [metrics(tmp_path / f"runs/{cell},seed={seed}")[-1]["val_top1"] for seed in (1, 2, 3)]
        assert row.measures["top1"].mean == pytest.approx(statistics.fmean(found))
    assert rows[ordered[0].cell].difference.seeds == 3


def test_halving_within_a_batch_stops_trials_and_lets_others_go_on(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options: dict[str, Any] = {
        "student": {"epochs": 3},
        "halving": {"epochs": [1], "keep": 0.5},
        "batch": 4,
        "trials": 8,
    }
    result = searched(cache, tmp_path, "optuna", **options)
    assert [trial.state for trial in result.trials[:4]].count("stopped") == 2
    for batch in (result.trials[:4], result.trials[4:]):
        first = {t.cell: metrics(run_of(tmp_path, t))[0]["val_top1"] for t in batch}
        gone_on = [first[trial.cell] for trial in batch if trial.state == "finished"]
        assert min(gone_on) >= max(first[trial.cell] for trial in batch if trial.state == "stopped")
    assert {(trial.state, trial.epochs) for trial in result.trials} == {("stopped", 1), ("finished", 3)}
    journal = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert sum("intermediate_value" in entry for entry in journal) == 4, "TPE learns from those that were stopped"
    assert searched(cache, tmp_path, "optuna", **options).trials == result.trials


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_that_fails_is_reported_and_the_others_go_on(
    kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"kind": "custom", "factory": CODE["factory"] + "failing"}
    models = {"sound": LINEAR, "mine": code | {"arguments": {"at": 2}}}
    options: dict[str, Any] = {"space": {"model": models, "optimizer.lr": [1e-3, 1e30]}, "trials": 12, "batch": 12}
    options |= {"student": {"optimizer": {"kind": "sgd"}}}
    result = searched(cache, tmp_path, kind, **options)
    for trial in result.trials:
        wrong = "mine" in trial.cell or "lr=1e+30" in trial.cell
        assert trial.state == ("failed" if wrong else "finished"), trial
    assert {trial.state for trial in result.trials} == {"failed", "finished"}
    assert result.exit_code != 0
    steps: list[str] = []
    add = Learner.add
    monkeypatch.setattr(Learner, "add", lambda self, *args: (steps.append("step"), add(self, *args))[1])
    monkeypatch.setattr("tests.sweeps.small.Failing.forward", lambda self, images: self.layers(images))
    again = searched(cache, tmp_path, kind, **options)
    repaired = {t.cell for t in result.trials if "mine" in t.cell and "lr=1e+30" not in t.cell}
    assert len(steps) >= 2 * 2 * len(repaired) > 0
    assert {t.cell for t in again.trials if t.state == "failed"} == {
        t.cell for t in result.trials if "lr=1e+30" in t.cell
    }


@pytest.mark.parametrize("kind", KINDS)
def test_points_that_are_no_recipe_are_trials_that_fail(kind: str, cache: Path, tmp_path: Path) -> None:
    space = {"losses": {"kl": [{"kind": "kl_divergence"}], "dist": [{"kind": "dist"}]}, "micro_batches": [1, 2]}
    result = searched(cache, tmp_path, kind, space=space, trials=8, batch=8)
    impossible = [trial for trial in result.trials if "dist" in trial.cell and "micro_batches=2" in trial.cell]
    assert [trial for trial in result.trials if trial.state == "failed"] == impossible != []
    assert all("leave out micro_batches" in str(trial.reason) for trial in impossible)


def test_a_batch_in_which_nothing_can_be_trained_ends_the_search(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("optuna")
    result = searched(tmp_path / "none", tmp_path / "out", "optuna")
    assert len(result.trials) == 2
    assert (result.finished, result.exit_code) == (0, 3)
    assert not [line for line in (tmp_path / "out/study.jsonl").read_text().splitlines() if '"state":3' in line]


def test_agreement_with_the_teacher_needs_no_labels(cache: Path, tmp_path: Path) -> None:
    unlabelled = fill(tmp_path / "unlabelled", images=UNLABELLED)
    student = {"validation": {"cache": str(unlabelled), "dataset": UNLABELLED, "batch_size": 200}}
    result = searched(cache, tmp_path / "out", objectives=["agreement"], student=student, trials=2)
    for trial in result.trials:
        row = metrics(run_of(tmp_path / "out", trial))[-1]
        assert trial.values == {"agreement": row["val_agreement"]}
        assert row.get("val_top1") is None


def test_without_the_extra_the_fix_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    recipe = swept(cache, student=STUDENT, search={"kind": "optuna", "space": {"epochs": [1]}, "trials": 1})
    from logitcache.sweeps.sweep import sweep

    with pytest.raises(MissingExtraError, match=r"pip install 'logitcache\[tune\]'"):
        sweep(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"grid": {"epochs": [1, 2]}}, "takes the place of the grid"),
        ({"student": {"validation": None}}, "accuracy is measured on validation images. Fix: student.validation"),
        ({"space": {"seed": [1, 2]}}, "seed is not for grid and cells to change"),
    ],
)
def test_a_sweep_that_cannot_search_is_refused(entries: dict[str, Any], message: str, cache: Path) -> None:
    search = {"kind": "random", "space": entries.pop("space", {"epochs": [1]}), "trials": 1}
    with pytest.raises(RecipeError, match=message):
        swept(cache, student=STUDENT | entries.pop("student", {}), search=search, **entries)


def test_wrong_ends_of_a_space_are_listed_before_anything_trains(cache: Path, tmp_path: Path) -> None:
    space = {"optimizer.lr": {"kind": "uniform", "low": -1, "high": 1}, "epochz": [1], "a, b": [[1, 2]]}
    with pytest.raises(RecipeError, match=r"(?s)cell lr=-1: .*cell epochz=1: .*unknown key"):
        searched(cache, tmp_path / "out", space=space)
    with pytest.raises(RecipeError, match=r"search.space.a, b: 1 is no list of 2 values"):
        searched(cache, tmp_path / "out", space={"a, b": [1]})
    assert not (tmp_path / "out").exists()
    file = tmp_path / "wrong.yaml"
    search = {"kind": "random", "space": {"optimizer.lr": [0.1, -1]}, "trials": 1, "objectives": ["parameters"]}
    student = {"cache": str(cache), "epochs": 1, "model": LINEAR}
    file.write_text(json.dumps({"kind": "sweep", "student": student, "search": search}))
    (checked,) = check_recipes([file])
    assert "cell lr=-1" in str(checked.error)


def test_the_command_line_searches(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"cache": str(cache), "out": "runs/s", "epochs": 1, "num_workers": 0, "device": "cpu", **STUDENT}
    (tmp_path / "s.yaml").write_text(json.dumps(entries))
    line = ["sweep", str(tmp_path / "s.yaml"), str(tmp_path / "out"), "--trials", "2"]
    line += ["--space", "optimizer.lr={kind: uniform, low: 0.1, high: 0.2}", "--space", "ema=0.5,0.9"]
    assert main([*line, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [0.1 <= trial["changes"]["optimizer.lr"] <= 0.2 for trial in trials] == [True, True]
    assert main(line) == 0
    assert "trial=1,lr=0.1" in capsys.readouterr().out
    found = load_sweep(tmp_path / "out/sweep.yaml")
    assert found.search is not None
    assert (found.search.kind, found.search.trials) == ("random", 2)
    assert main(["sweep", str(tmp_path / "out/sweep.yaml"), str(tmp_path / "out"), "--trials", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["finished"], document["trials"][:2]) == (3, trials)
