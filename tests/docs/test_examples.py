"""Every example of README and docs: Python is run, recipes are validated, commands exist with their options."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from logitcache.cache.cache import open_cache
from logitcache.cli.commands import app
from logitcache.config.recipe import load_recipe
from logitcache.report.recipe_check import check_recipes
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from tests.cache.made import verified
from tests.student.small import student
from tests.teacher.nets import Net, images

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FASHION = ROOT / "pipelines/fashion_mnist/precompute.yaml"
EXCERPTS: dict[str, dict[str, Any]] = {
    "dataset": {"cache": "c.zarr", "teachers": {"t": {"model": {"kind": "bundled"}}}},
    "teachers": {"cache": "c.zarr", "dataset": {"kind": "image_folder", "root": "photos"}},
    "ensembles": {"cache": "c.zarr", "out": "run", "epochs": 1, "model": {"kind": "small_cnn"}},
}
"""What the rest of a recipe may be of which docs/recipes.md shows a part, by the first key of that part."""
MODEL = {"kind": "torchvision", "name": "resnet18", "weights": None}


def blocks(language: str) -> list[Any]:
    """List the examples in a language as (page and number, text)."""
    found = [(page, re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)) for page in PAGES]
    return [
        pytest.param(f"{page.name} {number}", text, id=f"{page.name} {number}")
        for page, texts in found
        for number, text in enumerate(texts)
    ]


def test_every_example_is_in_a_language_that_is_tried() -> None:
    languages = {
        name
        for page in PAGES
        for name in re.findall(r"^```(\S*)\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    }
    assert languages == {"bash", "python", "text", "yaml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache, the run and the image that the pages name."""
    folder = tmp_path_factory.mktemp("examples")
    cache = folder / "caches/fashion_mnist/train.zarr"
    changes = [f"cache={cache}", "dataset.num_images=50", "num_workers=0", "views.num_views=2"]
    precompute(load_recipe(FASHION, PrecomputeRecipe, changes))
    train(student(folder / "runs/student", cache, epochs=1))
    Image.new("L", (40, 30)).save(folder / "shoe.png")
    return folder


@pytest.mark.parametrize(("name", "code"), blocks("python"))
def test_python_runs(name: str, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    code = code.replace("s3://bucket/caches/train.zarr", "caches/fashion_mnist/train.zarr")
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "text"), blocks("yaml"))
def test_recipes_are_valid(name: str, text: str, tmp_path: Path) -> None:
    entries = yaml.safe_load(text)
    first = next(iter(entries))
    if name.startswith("recipes.md"):
        entries = EXCERPTS[first] | entries
    if first == "teachers":
        entries["teachers"] = {teacher: {"model": MODEL} | entry for teacher, entry in entries["teachers"].items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(entries))
    (checked,) = check_recipes([file])
    assert checked.error is None


@pytest.mark.parametrize(("name", "text"), blocks("bash"))
def test_commands_exist_with_their_options(name: str, text: str) -> None:
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    for words in (shlex.split(line) for line in lines if line.startswith("logitcache ")):
        names = words[1:3] if words[1] == "recipe" else words[1:2]
        shown = CliRunner().invoke(app, [*names, "--help"])
        assert shown.exit_code == 0, words
        assert all(word in shown.output for word in words if word.startswith("--")), words
        for word in words:
            assert not word.startswith("pipelines/") or (ROOT / word).exists(), word


def test_the_first_example_of_derive_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pooled = {"pooled": {"kind": "pooled", "tap": "relu"}}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    entries = {"resnet50": {"preprocessing": half, "features": pooled}, "vit": {"preprocessing": half}}
    recipe = {"cache": "caches/imagenet.zarr", "teachers": entries, "num_workers": 0, "device": "cpu"}
    Path("caches").mkdir()
    modules = {"resnet50": Net(), "vit": Net()}
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers=modules, dataset=images(300))
    (text,) = [block.values[1] for block in blocks("yaml") if block.values[0] == "derive.md 0"]
    derive(load_recipe(yaml.safe_load(text), DeriveRecipe))
    assert verified(Path("caches/imagenet-small.zarr")) == ()
    made = open_cache("caches/imagenet-small.zarr").manifest.teachers
    assert {name: set(entry.targets) for name, entry in made.items()} == {
        "resnet50": {"logits", "pooled"},
        "vit": {"logits"},
        "both": {"logits"},
    }
