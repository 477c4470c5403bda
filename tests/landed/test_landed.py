"""Caches and runs of the first landed release open, verify, train, resume and grow."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import logitcache as lc
from logitcache.cli import main
from logitcache.logits import log_probs
from logitcache.targets import feature_values
from logitcache.views.keys import ViewKey

CACHES = ("cache.zarr", "mixed.zarr")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landed")
    with tarfile.open(Path(__file__).with_name("landed.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def landed(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy what the release wrote, and work in its folder: its paths are relative."""
    folder = tmp_path / "landed"
    shutil.copytree(extracted, folder)
    monkeypatch.chdir(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run a command that must succeed and return its document."""
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, f"{arguments}: {out} {err}"
    return json.loads(out)


@pytest.mark.parametrize("name", CACHES)
def test_rows_are_those_that_the_release_read(landed: Path, name: str) -> None:
    cache = lc.open_cache(name)
    wanted = np.load("rows.npz")
    rows = cache.rows([ViewKey(view, index) for view in range(cache.num_views) for index in range(len(cache))])
    for teacher, targets in rows.items():
        found = {"log_probs": log_probs(targets.logits, 1.0)}
        found |= {feature: feature_values(value) for feature, value in targets.features.items()}
        for key, value in found.items():
            np.testing.assert_allclose(value.float().numpy(), wanted[f"{name}|{teacher}|{key}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_it_verifies_pixels_included(landed: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(capsys, "verify", name)["problems"] == []
    assert run(capsys, "inspect", name)["complete"]
    assert run(capsys, "summary", name)


def test_precompute_finds_it_complete(landed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("precompute.yaml", "mixed.yaml"):
        assert run(capsys, "precompute", name)["shards_written"] == 0


def test_it_grows_by_the_views_of_its_own_plan(landed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for name in CACHES for path in (landed / name).glob("*/c*") if path.is_file()}
    for name, cache in (("precompute.yaml", "cache.zarr"), ("mixed.yaml", "mixed.zarr")):
        assert run(capsys, "precompute", name, "--set", "views.num_views=3")["shards_written"] == 1
        assert run(capsys, "verify", cache)["problems"] == []
        assert lc.open_cache(cache).num_views == 3
    assert {path: path.read_bytes() for path in files} == files


def test_a_killed_run_resumes_to_the_weights_of_the_finished_one(
    landed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "train-student", "student.yaml", "--resume")
    assert result["epochs"] == 3
    found, wanted = load_file("run/weights.safetensors"), load_file("finished/weights.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)


def test_its_recipes_train_evaluate_and_its_runs_teach(landed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "evaluate", "finished")
    student = yaml.safe_load(Path("student.yaml").read_text())
    for number, losses in enumerate(
        (
            [{"kind": "kl_divergence", "teacher": "top", "temperature": 2.0}],
            [{"kind": "kl_divergence", "teacher": "coded"}],
        )
    ):
        Path("other.yaml").write_text(
            yaml.safe_dump(student | {"losses": losses, "out": f"other{number}", "epochs": 1})
        )
        assert run(capsys, "train-student", "other.yaml")["epochs"] == 1


def test_a_cache_that_grows_keeps_its_plan_and_a_new_one_takes_the_newest(
    landed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "precompute", "mixed.yaml", "--set", "views.num_views=3")
    run(capsys, "precompute", "mixed.yaml", "--set", "cache=new.zarr")
    assert {name: lc.open_cache(name).manifest.views.plan_version for name in ("mixed.zarr", "new.zarr")} == {
        "mixed.zarr": 1,
        "new.zarr": 2,
    }


def test_errors_are_shown_as_they_were_recorded(landed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = lc.open_cache("cache.zarr").manifest
    shown = run(capsys, "inspect", "cache.zarr")["teachers"]
    kinds = {entry.stored_logits.form.kind for entry in manifest.teachers.values()}
    assert kinds == {"dense", "top_k", "transform"}
    for name, entry in manifest.teachers.items():
        dense = entry.stored_logits.form.kind == "dense"
        logits = next(row for row in shown[name]["targets"] if row["target"] == "logits")
        assert logits["errors"] == ("not recorded" if dense else "recorded")
        errors = [row["temperature"] for row in shown[name]["errors"] if row["target"] == "logits"]
        assert errors == ([] if dense else [1.0])
        assert "error_temperatures" not in entry.stored_logits.model_dump(mode="json")
    assert manifest.class_names is None
    assert all("name" not in row for row in run(capsys, "summary", "cache.zarr")["per_class"])
