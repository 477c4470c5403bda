"""Recipes that ship with the package: list, read and copy them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import RecipeError, did_you_mean
from logitcache.runtime.shipped_files import shipped_folder

_SCHEMA = re.compile(r"# yaml-language-server: \$schema=(\S+)")
NEW_RECIPES = (
    *("recipe", "new", "--images", "photos"),
    *("--teacher", "timm:resnet50.a1_in1k", "--student", "timm:mobilenetv3_small_100.lamb_in1k"),
)
"""The words of the first command for a folder of one's own."""

_COMMAND = re.compile(r"^# +logitcache ([\w-]+) ", re.MULTILINE)


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe: `name` is folder/file without the suffix, `command` what runs it, `summary` its first sentence."""

    name: str
    command: str
    summary: str
    file: Path


def pipelines_folder() -> Path:
    """Return the folder of recipes and schemas."""
    return shipped_folder("pipelines")


def schema_file(command: str) -> Path:
    """Return the JSON Schema of the recipes of a command."""
    return pipelines_folder() / "schemas" / f"{command}.json"


def shipped_recipes() -> list[ShippedRecipe]:
    """List all recipes by name."""
    folder = pipelines_folder()
    return [_described(file, folder) for file in sorted(folder.rglob("*.yaml"))]


def find_recipes(name: str) -> list[ShippedRecipe]:
    """Return the recipe of a name such as `fashion_mnist/student`, or all recipes of a folder.

    Raises RecipeError for an unknown name, with the nearest known one.
    """
    wanted = name.removeprefix("pipelines/").removesuffix(".yaml").strip("/")
    every = shipped_recipes()
    found = [recipe for recipe in every if wanted in (recipe.name, recipe.name.partition("/")[0])]
    if not found:
        known = {part for recipe in every for part in (recipe.name, recipe.name.partition("/")[0])}
        raise RecipeError(
            f"no recipe of the name {name!r} ships with logitcache.{did_you_mean(wanted, known)} "
            "Fix: `logitcache recipe ls` lists them"
        )
    return found


def copy_recipes(name: str, folder: Path) -> list[Path]:
    """Copy a recipe, or all of a folder, to the same place below `folder`; return the new files.

    Raises RecipeError as `write_recipes`.
    """
    return write_recipes({folder / f"{recipe.name}.yaml": recipe.file.read_text() for recipe in find_recipes(name)})


def write_recipes(texts: Mapping[Path, str]) -> list[Path]:
    """Write new recipes, and the JSON Schemas that their first lines name for editors; return the files.

    A schema that exists is written again. Raises RecipeError, before anything is written, if a recipe exists or cannot
    be written.
    """
    existing = [str(file) for file in texts if file.exists()]
    if existing:
        raise RecipeError(
            f"{existing[0]} exists and is not overwritten. Fix: remove it, or name another folder "
            "(recipe new: --out DIR)"
        )
    named = {
        Path(os.path.normpath(file.parent / match[1])) for file, text in texts.items() if (match := _SCHEMA.match(text))
    }
    texts = {**texts, **{file: schema_file(file.stem).read_text(encoding="utf-8") for file in sorted(named)}}
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{error.filename} cannot be written: {error.strerror}. Fix: name another folder") from error
    return list(texts)


def _described(file: Path, folder: Path) -> ShippedRecipe:
    text = file.read_text().partition("\n")[2]  # the first line names the schema, for editors
    match = _COMMAND.search(text)
    assert match is not None, file
    name = file.relative_to(folder).with_suffix("").as_posix()
    comment = " ".join(text[: match.start()].replace("\n# ", " ").split())
    return ShippedRecipe(name, match[1], re.split(r"(?<=\.) (?=[A-Z`])", comment.removeprefix("# "))[0], file)
