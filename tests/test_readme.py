"""What README shows must work: its Python runs, its commands and recipes exist, its links lead somewhere."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from logitcache.cli.commands import app
from logitcache.recipe import load_recipe
from logitcache.report.recipes import check_recipes
from logitcache.teacher.precompute import PrecomputeRecipe, precompute

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("logitcache ")]


def test_both_make_targets_come_before_anything_else_to_run() -> None:
    assert re.findall(r"make \w+", README)[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"cache={tmp_path}/caches/fashion_mnist/train.zarr", "dataset.num_images=100", "num_workers=0"]
    precompute(load_recipe(ROOT / "pipelines/fashion_mnist/precompute.yaml", PrecomputeRecipe, overrides))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_every_command_shown_exists_with_its_options() -> None:
    assert len(commands()) > 5
    for words in commands():
        names = words[:2] if words[0] == "recipe" else words[:1]
        shown = CliRunner().invoke(app, [*names, "--help"])
        assert shown.exit_code == 0, words
        options = [word for word in words if word.startswith("--")]
        assert all(option in shown.output for option in options), words


def test_every_recipe_shown_is_valid_with_its_overrides() -> None:
    for words in commands():
        recipes = [word for word in words if word.startswith("pipelines/")]
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        for checked in check_recipes([ROOT / path for path in recipes], overrides):
            assert checked.error is None


@pytest.mark.parametrize("recipe", blocks("yaml"))
def test_every_recipe_printed_is_valid(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    (checked,) = check_recipes([file])
    assert checked.error is None


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
