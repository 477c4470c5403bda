"""What README shows must work: its Python runs, its commands and recipes exist, its links lead somewhere."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from logitcache.cli.commands import app
from logitcache.config.recipe import load_recipe
from logitcache.report.recipe_check import check_recipes
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FASHION = ROOT / "pipelines/fashion_mnist/precompute.yaml"
ENCODINGS = {
    "float16": ["teachers.teacher.logits={kind: dense, dtype: float16}"],
    "float32": ["teachers.teacher.logits={kind: dense, dtype: float32, storage: packed}"],
    "uint8": ["teachers.teacher.logits={kind: uint8}"],
    "top_k": ["teachers.teacher.logits={kind: top_k, k: 3}"],
    "packed_top_k": ["teachers.teacher.logits={kind: packed_top_k, k: 3}"],
    "transform": ["teachers.teacher.logits={kind: transform, step: 0.5}"],
    "head": ["teachers.teacher.logits={kind: head}"],
    "mixed": ["teachers.teacher.logits={kind: top_k, k: 3}", "views.mixing=[{kind: mixup}]", "views.targets=linear"],
}
"""Overrides of README's recipe, by what is kept of the logits."""


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
    precompute(load_recipe(FASHION, PrecomputeRecipe, overrides))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module", params=ENCODINGS)
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with README's cache, its logits in one of the encodings."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = [f"cache={folder}/caches/fashion_mnist/train.zarr", "dataset.num_images=100", "num_workers=0"]
    precompute(load_recipe(FASHION, PrecomputeRecipe, [*overrides, "views.num_views=2", *ENCODINGS[request.param]]))
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_loop_trains_as_train_student_does(
    encoded: Path, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoded)
    (loop,) = (code for code in blocks("python") if "cache.loader(" in code)
    assert "temperature=2.0" in loop
    found: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    exec(compile(loop.replace("temperature=2.0", f"temperature={temperature}"), "README.md", "exec"), found)
    entries = {
        "model": {"kind": "custom", "factory": "tests.student.small:flat"},
        "preprocessing": {"mean": [0.0], "std": [1.0]},
        "optimizer": {"kind": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"final_lr": 1.0},
        "losses": [{"kind": "kl_divergence", "temperature": temperature}],
        **{"out": str(tmp_path / "run"), "cache": "caches/fashion_mnist/train.zarr", "epochs": 2, "batch_size": 64},
        **{"num_workers": 0, "device": "cpu", "seed": 0},
    }
    train(load_recipe(entries, StudentRecipe))
    trained = load_file(tmp_path / "run" / "weights.safetensors")
    own = found["student"].state_dict()
    assert trained.keys() == own.keys()
    for name, values in own.items():
        torch.testing.assert_close(trained[name], values, rtol=0, atol=1e-7)


def test_every_command_shown_exists_with_its_options() -> None:
    assert len(commands()) >= 3
    for words in commands():
        names = words[:2] if words[0] == "recipe" else words[:1]
        shown = CliRunner().invoke(app, [*names, "--help"])
        assert shown.exit_code == 0, words
        options = [word for word in words if word.startswith("--")]
        assert all(option in shown.output for option in options), words


def test_every_recipe_shown_is_valid_with_its_overrides() -> None:
    for words in commands():
        # Those of pipelines/photos are written by `recipe new`; tests/docs/test_examples.py runs them.
        recipes = [word for word in words if word.startswith("pipelines/") and "photos" not in word]
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        for checked in check_recipes([ROOT / path for path in recipes], overrides):
            assert checked.error is None


@pytest.mark.parametrize("recipe", blocks("yaml"))
def test_every_recipe_printed_is_valid(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    (checked,) = check_recipes([file])
    assert checked.error is None


def test_the_chinese_readme_has_the_same_commands_and_code() -> None:
    chinese = (ROOT / "README.zh.md").read_text()

    def examples(text: str) -> list[str]:
        blocks = re.findall(r"```(?:bash|yaml|python)\n(.*?)```", text, re.DOTALL)
        return [re.sub(r" *#.*", "", block) for block in blocks]

    assert examples(chinese) == examples(README)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_front_page_is_short(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 120] == []
