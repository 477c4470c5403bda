"""The recipes and the loop under pipelines/ are what a user copies: each must work as it stands."""

import re
import runpy
from pathlib import Path

import pytest

from logitcache.recipe import load_recipe
from logitcache.report.recipes import RECIPES, check_recipes, command_of
from logitcache.teacher.precompute import PrecomputeRecipe, precompute

PIPELINES = Path(__file__).parent.parent / "pipelines"
RECIPE_FILES = sorted(PIPELINES.rglob("*.yaml"))


def test_there_are_recipes_of_every_kind() -> None:
    assert {command_of(path) for path in RECIPE_FILES} == set(RECIPES)


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: str(path.relative_to(PIPELINES)))
def test_recipe_is_valid_and_names_the_command_it_is_for(path: Path) -> None:
    (checked,) = check_recipes([path])
    assert checked.error is None
    relative = path.relative_to(PIPELINES.parent)
    assert f"#   logitcache {checked.command} {relative}" in path.read_text()


def test_custom_loop_learns_from_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"cache={tmp_path / 'c.zarr'}", "views.num_views=2", "dataset.num_images=500", "num_workers=0"]
    precompute(load_recipe(PIPELINES / "fashion_mnist" / "precompute.yaml", PrecomputeRecipe, overrides))
    monkeypatch.setattr("sys.argv", ["custom_loop.py", str(tmp_path / "c.zarr"), "--epochs", "6"])
    runpy.run_path(str(PIPELINES / "custom_loop.py"), run_name="__main__")
    agreement = [float(found) for found in re.findall(r"on ([\d.]+)%", capsys.readouterr().out)]
    assert len(agreement) == 6
    assert agreement[-1] > agreement[0]
    assert agreement[-1] > 30
