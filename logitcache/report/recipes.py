"""Which kind of recipe a file is, and whether it is valid."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logitcache.cache.reader import Cache
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.diagnosis import validate
from logitcache.errors import LogitCacheError, RecipeError
from logitcache.recipe import Component, load_recipe, read_recipe, require_effect
from logitcache.student.recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.sources import lesson_of
from logitcache.student.trial import require_fit
from logitcache.teacher.derive_recipe import DeriveRecipe
from logitcache.teacher.opening import require_teachers
from logitcache.teacher.precompute import PrecomputeRecipe

RECIPES: dict[str, type[Component]] = {
    "precompute": PrecomputeRecipe,
    "derive": DeriveRecipe,
    "train-student": StudentRecipe,
    "train-teacher": TeacherRecipe,
}

R = TypeVar("R", bound=Component)


@dataclass(frozen=True)
class CheckedRecipe:
    """One file: the command it is for, and what is wrong with it, None when nothing is."""

    path: str
    command: str | None
    error: str | None


def check_recipes(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> list[CheckedRecipe]:
    """Validate recipes of any kind, a student's also against its cache where that is there: it is built, and tried.

    All mistakes in what a file says are told.
    """
    return [_check(path, overrides) for path in paths]


def _check(path: str | Path, overrides: Sequence[str]) -> CheckedRecipe:
    command = None
    try:
        command = command_of(path)
        recipe = load_recipe(path, RECIPES[command], overrides)
        require_effect(recipe, recipe.epochs if isinstance(recipe, TrainingRecipe) else math.inf)
        if isinstance(recipe, StudentRecipe):
            _require_fit(recipe)
        if isinstance(recipe, PrecomputeRecipe):
            require_teachers(recipe.teachers)
    except LogitCacheError as error:
        return CheckedRecipe(str(path), command, str(error))
    return CheckedRecipe(str(path), command, None)


def _require_fit(recipe: StudentRecipe) -> None:
    """Raise for losses that the cache cannot serve and a student that does not fit it, where it is there to ask."""
    store = locate(recipe.cache)
    if store.path.exists():
        require_fit(recipe, lesson_of(recipe, Cache(Snapshot.read(store))))


def command_of(path: str | Path) -> str:
    """Tell which command a recipe is for: the one whose keys it has, with the fewest mistakes. Raises RecipeError."""
    data = read_recipe(path)
    command = min(RECIPES, key=lambda command: _misfit(data, RECIPES[command]))
    if not data.keys() & RECIPES[command].model_fields.keys():
        raise RecipeError(
            f"{path}:1: no recipe has these keys; `precompute` needs teachers, `derive` cache, out and teachers, "
            "`train-student` cache and model, `train-teacher` dataset and model"
        )
    return command


def load_own(path: str | Path, model: type[R], overrides: Sequence[str] = ()) -> R:
    """Load a recipe as `load_recipe` does; of one that is meant for another command, say just that."""
    try:
        return load_recipe(path, model, overrides)
    except RecipeError:
        _require_own(path, model)
        raise


def _require_own(path: str | Path, model: type[R]) -> None:
    """Raise RecipeError for a file that is another command's recipe, and has fewer mistakes as that."""
    try:
        data, command = read_recipe(path), command_of(path)
    except RecipeError:  # what is no recipe of any kind has been told
        return
    meant, (own,) = RECIPES[command], [name for name, kind in RECIPES.items() if kind is model]
    foreign = ", ".join(key for key in data if key not in model.model_fields)
    lacking = ", ".join(key for key, field in model.model_fields.items() if field.is_required() and key not in data)
    why = " and ".join([f"has {foreign}"] * bool(foreign) + [f"lacks {lacking}"] * bool(lacking))
    if why and _misfit(data, meant)[1] < _misfit(data, model)[1]:
        raise RecipeError(
            f"{path} looks like a recipe of `{command}`, and this takes one of `{own}`: it {why}. "
            f"Fix: run `logitcache {command} {shlex.quote(str(path))}`, or name a recipe of `{own}`"
        )


def _misfit(data: Mapping[str, Any], model: type[Component]) -> tuple[int, int]:
    """Count the keys that a kind of recipe does not have, which decide, and all mistakes as one of that kind."""
    return len(data.keys() - model.model_fields.keys()), len(validate(data, model)[1])
