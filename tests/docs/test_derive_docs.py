"""What docs/how-to/derive-a-cache.md shows: its recipe is one, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from logitcache.cli.commands import app
from logitcache.config.recipe import load_recipe
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "how-to" / "derive-a-cache.md").read_text()


def test_the_recipe_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    recipe = load_recipe(yaml.safe_load(block), DeriveRecipe)
    assert list(recipe.teachers) == ["resnet50", "vit", "both"]


def test_every_command_exists_with_its_options() -> None:
    lines = re.findall(r"^logitcache .*", TEXT, re.MULTILINE)
    assert len(lines) == 3
    for words in map(shlex.split, lines):
        shown = CliRunner().invoke(app, [words[1], "--help"])
        assert all(word in shown.output for word in words if word.startswith("--")), words
        assert (ROOT / words[2]).exists()
