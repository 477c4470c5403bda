"""Recipes that ship with the package."""

import json
from pathlib import Path

import pytest

from logitcache.cli.app import main
from logitcache.config.shipped_recipes import shipped_recipes
from logitcache.report.recipe_check import command_of

PIPELINES = Path(__file__).parents[2] / "pipelines"


def test_every_recipe_is_listed_with_the_command_that_runs_it() -> None:
    recipes = shipped_recipes()
    assert {recipe.file for recipe in recipes} == set(PIPELINES.rglob("*.yaml"))
    for recipe in recipes:
        assert recipe.command == command_of(recipe.file)
        assert recipe.summary.endswith(".")


def test_ls_prints_names_that_show_and_cp_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipe", "ls"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "fashion_mnist/student" in names
    for name in names:
        capsys.readouterr()
        assert main(["recipe", "show", name]) == 0
        assert capsys.readouterr().out == (PIPELINES / f"{name}.yaml").read_text()
        assert main(["recipe", "cp", name, str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.yaml").read_bytes() == (PIPELINES / f"{name}.yaml").read_bytes()


def test_a_folder_is_copied_below_pipelines_as_its_comments_name_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "cp", "image_folder", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == [
        *("pipelines/image_folder/precompute.yaml", "pipelines/image_folder/student.yaml"),
        *("pipelines/schemas/precompute.json", "pipelines/schemas/train-student.json"),
    ]
    assert main(["recipe", "check", files[0]]) == 0


def test_nothing_is_overwritten_and_nothing_is_half_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "image_folder" / "student.yaml"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert main(["recipe", "cp", "image_folder", str(tmp_path)]) == 2
    assert f"{kept} exists and is not overwritten" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("name", "near"), [("fashon_mnist", "fashion_mnist"), ("cifar/studnet.yaml", "cifar/student"), ("../data", "")]
)
def test_an_unknown_name_gets_the_nearest(capsys: pytest.CaptureFixture[str], name: str, near: str) -> None:
    assert main(["recipe", "show", name]) == 2
    error = capsys.readouterr().err
    assert repr(name) in error
    assert f"Did you mean '{near}'?" in error or not near
    assert "logitcache recipe ls" in error


def test_a_folder_that_cannot_be_written_is_an_error_of_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["recipe", "cp", "cifar", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
