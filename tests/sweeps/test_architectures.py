"""Architectures: what models cost, halving by it, and spaces over models."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.cache.pairs.pair import pair
from logitcache.errors import CacheError
from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import members_of
from logitcache.sweeps.search.search import require_sound
from logitcache.views.datasets import Bundled
from tests.student.small import IMAGES, LINEAR, NUM_IMAGES, metrics
from tests.sweeps.small import CODE, KINDS, STUDENT, run_of, searched, swept

COSTLY = {
    "objectives": ["accuracy", "latency", "parameters", "flops"],
    "space": {"model.width": [2, 4], "ema": [0.5, 0.9]},
}
CNN = {"model": {"kind": "small_cnn", "width": 2}, "epochs": 1}


def test_an_architecture_is_measured_once_and_a_resumed_search_compares_by_the_same_numbers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([[0.25], [0.5]])
    timed: list[int] = []
    monkeypatch.setattr(
        "logitcache.sweeps.architecture_costs.median_seconds",
        lambda contenders, *options: timed.append(len(contenders)) or next(times),
    )
    result = searched(cache, tmp_path, student=CNN, trials=8, batch=1, **COSTLY)
    assert timed == [1, 1], "for eight trials of two widths"
    latency = {trial.changes["model.width"]: trial.values["latency"] for trial in result.trials}
    assert sorted(latency.values()) == [0.25, 0.5]
    counts = {trial.changes["model.width"]: trial.values["parameters"] for trial in result.trials}
    assert counts[2] < counts[4]
    (one, *_) = result.trials
    recorded = json.loads((run_of(tmp_path, one) / "result.json").read_text())["num_parameters"]
    assert one.values["parameters"] == recorded
    assert searched(cache, tmp_path, student=CNN, trials=8, batch=1, **COSTLY).trials == result.trials
    record, *_ = sorted((tmp_path / "architectures").iterdir())
    assert json.loads(record.read_text())["measured"] == {
        "device": "cpu", "precision": "float32", "batch_size": 1, "threads": 1, "warm_up": 5, "repeats": 30,
    }  # fmt: skip
    record.write_text("{}")
    with pytest.raises(CacheError, match=r"is damaged: .*Fix: remove it; the model is then measured again"):
        searched(cache, tmp_path, student=CNN, trials=8, batch=1, **COSTLY)


def test_students_of_images_of_another_size_are_measured_apart(cache: Path, tmp_path: Path) -> None:
    cells = {"whole": {}, "half": {"pairing": str(tmp_path / "half"), "dataset": IMAGES}}
    pair(cache, tmp_path / "half", Bundled(num_images=NUM_IMAGES), size=(14, 14))
    recipe = swept(cache, student=CNN, cells=cells)
    costs = ArchitectureCosts(tmp_path / "costs", recipe.latency)
    members = members_of(recipe, tmp_path)
    assert costs.measured(members, pytest.fail) == members
    whole, half = (costs.of(member.recipe).flops for member in members)
    assert half < whole


def test_a_model_that_cannot_be_measured_fails_as_its_student_would(cache: Path, tmp_path: Path) -> None:
    models = {"sound": LINEAR, "large": {"kind": "timm", "name": "no_such_model"}}
    result = searched(cache, tmp_path, space={"model": models}, objectives=["parameters"], trials=6, batch=6)
    assert {trial.state for trial in result.trials if "large" in trial.cell} == {"failed"}
    assert {trial.state for trial in result.trials if "sound" in trial.cell} == {"finished"}
    assert "no_such_model" in str(list(result.failed.values()))


def test_halving_by_several_objectives_lets_none_go_on_that_a_stopped_one_surpasses(
    cache: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"objectives": ["accuracy", "parameters"], "trials": 8, "batch": 8}
    options |= {"student": CNN | {"epochs": 2}, "halving": {"epochs": [1], "keep": 0.5}}
    space = {"model.width": [2, 4, 6, 8], "optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 0.1}}
    for kind in KINDS:
        result = searched(cache, tmp_path / kind, kind, space=space, **options)
        assert [trial.state for trial in result.trials].count("finished") == 4
        scores: dict[str, list[tuple[float, float]]] = {"finished": [], "stopped": []}
        for trial in result.trials:
            accuracy = metrics(run_of(tmp_path / kind, trial))[0]["val_top1"]
            scores[trial.state].append((accuracy, -trial.values["parameters"]))
        for a, b in scores["stopped"]:
            assert not any(a >= c and b >= d and (a, b) != (c, d) for c, d in scores["finished"])


def test_a_space_over_models_names_libraries_and_factories(cache: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    names = timm.list_models("test_*")[:2]
    space: dict[str, Any] = {
        "model": {
            **{name: {"kind": "timm", "name": name, "pretrained": False} for name in names},
            "torchvision": {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": None},
            "small": {"kind": "small_cnn"},
        }
    }
    search = {"kind": "random", "space": space, "trials": 4, "objectives": ["parameters", "flops"]}
    models = [member.recipe.model for member in require_sound(swept(cache, student=STUDENT, search=search))]
    assert [model.kind for model in models if model is not None] == ["timm", "timm", "torchvision", "small_cnn"]
    code = {"model": CODE | {"factory": CODE["factory"] + "failing", "arguments": {"at": 900}}, "epochs": 1}
    result = searched(
        cache, tmp_path, student=code, space={"model.arguments.at": {"kind": "integer", "low": 700, "high": 800}}
    )
    assert {trial.state for trial in result.trials} == {"finished"}
    assert all(700 <= trial.changes["model.arguments.at"] <= 800 for trial in result.trials)
