"""Which kind of recipe a file is, and whether it is valid."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.create import read_manifest
from logitcache.cache.locate import locate
from logitcache.cache.reader import Cache
from logitcache.errors import LogitCacheError, RecipeError
from logitcache.notation import nearest
from logitcache.recipe import Component, load_recipe, read_recipe
from logitcache.student.compatibility import require_served
from logitcache.student.recipes import StudentRecipe, TeacherRecipe
from logitcache.teacher.derive_recipe import DeriveRecipe
from logitcache.teacher.precompute import PrecomputeRecipe

RECIPES: dict[str, type[Component]] = {
    "precompute": PrecomputeRecipe,
    "derive": DeriveRecipe,
    "train-student": StudentRecipe,
    "train-teacher": TeacherRecipe,
}


@dataclass(frozen=True)
class CheckedRecipe:
    """One file: the command it is for, and what is wrong with it, None when nothing is."""

    path: str
    command: str | None
    error: str | None


def check_recipes(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> list[CheckedRecipe]:
    """Validate recipes of any kind, a student's also against its cache where that is there; all mistakes are told."""
    return [_check(path, overrides) for path in paths]


def _check(path: str | Path, overrides: Sequence[str]) -> CheckedRecipe:
    command = None
    try:
        command = command_of(path)
        recipe = load_recipe(path, RECIPES[command], overrides)
        if isinstance(recipe, StudentRecipe):
            _require_served(recipe)
    except LogitCacheError as error:
        return CheckedRecipe(str(path), command, str(error))
    return CheckedRecipe(str(path), command, None)


def _require_served(recipe: StudentRecipe) -> None:
    """Raise RecipeError for losses that the cache cannot serve, where it is there to ask."""
    path = locate(recipe.cache)
    if path.exists():
        require_served(recipe.losses, Cache(path, read_manifest(path)), recipe.ensembles)


def command_of(path: str | Path) -> str:
    """Tell which command a recipe is for from its keys, misspelt ones too. Raises RecipeError."""
    names = {field for model in RECIPES.values() for field in model.model_fields}
    keys = {key if key in names else nearest(key, names) for key in read_recipe(path)}
    # A student's recipe may name teachers too, for --online.
    if {"cache", "out", "teachers"} <= keys and not keys & {"model", "epochs", "losses"}:
        return "derive"
    if keys & {"model", "out", "epochs"}:
        return "train-student" if "cache" in keys else "train-teacher"
    if keys & {"teachers", "views"}:
        return "precompute"
    raise RecipeError(
        f"{path}:1: no recipe has these keys; `precompute` needs teachers, `derive` cache, out and teachers, "
        "`train-student` cache and model, `train-teacher` dataset and model"
    )
