"""Every command takes a cache and a run by any path that leads there."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from tests.cache.made import contents
from tests.stage_one.derived import derivation
from tests.stage_one.test_cluster import named
from tests.student.small import TINY, fill, student

LOCATIONS = [".", "./", "digest/..", "../c.zarr/", "../c.zarr/.", "../link", "../link/", "../link/digest/.."]
"""Paths to `c.zarr` from within it; a symbolic link beside it leads there too."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = fill(tmp_path_factory.mktemp("locations") / "c.zarr")
    path.with_name("link").symlink_to(path)
    return path


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    code = main([*command, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return {key: value for key, value in found.items() if key not in ("cache", "seconds", "out")}


@pytest.mark.parametrize("command", [["inspect"], ["summary"], ["verify"], ["gc", "--dry-run"], ["gc"]], ids=" ".join)
def test_commands_of_a_cache(
    cache: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(cache)
    expected = answer(capsys, *command, str(cache))
    monkeypatch.chdir(cache)
    for location in LOCATIONS:
        assert answer(capsys, *command, location) == expected
    assert contents(cache) == before


def test_stage_one_and_derive(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path = tmp_path / "r.yaml", tmp_path / "made" / "m.zarr"
    path.mkdir(parents=True)
    recipe.write_text(dump_recipe(named(path)))
    assert answer(capsys, "precompute", str(recipe), "--set", f"cache={path}/")["shards_written"] == 6
    whole = contents(path)
    path.with_name("link").symlink_to(path)
    monkeypatch.chdir(path)
    for location in (".", "digest/..", "../m.zarr/", "../link"):
        assert answer(capsys, "precompute", str(recipe), "--set", f"cache={location}")["shards_written"] == 0
        answer(capsys, "plan", str(recipe), "--set", f"cache={location}", "--batches", "1")
        made = dump_recipe(derivation(Path("c"), Path("o"), {"t": {"keep": "all"}}))
        (tmp_path / "d.yaml").write_text(made)
        answer(capsys, "derive", str(tmp_path / "d.yaml"), "--set", f"cache={location}", "--set", "out=../d.zarr/")
    assert contents(path) == whole
    assert sorted(item.name for item in path.parent.iterdir()) == ["d.zarr", "link", "m.zarr"]


def test_a_new_cache_at_a_path_without_a_name_is_refused_and_the_fix_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, place = tmp_path / "r.yaml", tmp_path / "new" / "m.zarr"
    place.mkdir(parents=True)
    recipe.write_text(dump_recipe(named(place)))
    monkeypatch.chdir(place)
    assert main(["precompute", str(recipe), "--set", "cache=."]) == 3
    message = capsys.readouterr().err
    assert "Fix: name it, as" in message
    fix = message.split("'")[-2]
    assert main(["precompute", str(recipe), "--set", f"cache={fix}"]) == 0
    assert (place / "zarr.json").is_file()


def test_training_and_evaluation(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump_recipe(student(tmp_path / "whole", cache, model=TINY, epochs=1)))
    expected = answer(capsys, "train-student", str(recipe))["loss"]
    for number, (folder, out) in enumerate([("a", "."), ("b", "x/.."), ("c", "../c/")]):
        run = tmp_path / folder
        (run / "x").mkdir(parents=True)
        (run / "x").rmdir() if out != "x/.." else None
        monkeypatch.chdir(run)
        options = ["--set", f"out={out}", "--set", f"cache={cache.parent}/link/{'digest/..' if number else ''}"]
        assert answer(capsys, "train-student", str(recipe), *options)["loss"] == expected
        assert (run / "weights.safetensors").is_file()
        for location in (".", f"../{folder}/"):
            images = "validation={dataset: {kind: bundled, split: test, num_images: 50}}"
            assert answer(capsys, "evaluate", location, "--set", images)
