"""Load the recipe of a command; one of another command is recognised, and so is one whose cache is not made yet."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from logitcache.cache.snapshot import locate
from logitcache.config.recipe import Component, load_recipe, read_recipe
from logitcache.errors import CacheError, RecipeError

if TYPE_CHECKING:
    from logitcache.student.training_recipes import StudentRecipe

R = TypeVar("R", bound=Component)


def load_own(path: str | Path, model: type[R], overrides: Sequence[str] = ()) -> R:
    """Load a recipe as `load_recipe` does; raise only that for one of another command, with fewer mistakes as that."""
    try:
        return load_recipe(path, model, overrides)
    except RecipeError as error:
        # It imports the recipes of all commands, and so most of the library.
        from logitcache.report.recipe_check import RECIPES, command_of, misfit

        try:
            data, command = read_recipe(path), command_of(path)
        except RecipeError:
            raise error from None  # a recipe of no kind
        meant, (own,) = RECIPES[command], [name for name, kind in RECIPES.items() if kind is model]
        foreign = ", ".join(key for key in data if key not in model.model_fields)
        lacking = ", ".join(key for key, field in model.model_fields.items() if field.is_required() and key not in data)
        why = " and ".join([f"has {foreign}"] * bool(foreign) + [f"lacks {lacking}"] * bool(lacking))
        if why and misfit(data, meant)[1] < misfit(data, model)[1]:
            raise RecipeError(
                f"{path} looks like a recipe of `{command}`, and this takes one of `{own}`: it {why}. "
                f"Fix: run `logitcache {command} {shlex.quote(str(path))}`, or name a recipe of `{own}`"
            ) from error
        raise


def require_made(path: str | Path, student: "StudentRecipe") -> None:
    """Raise CacheError for a cache of a student that does not exist, with the command if a recipe beside makes it."""
    caches = [student.cache, None if student.validation is None else student.validation.cache]
    missing = {cache for cache in caches if cache is not None and not locate(cache).path.exists()}
    if not missing:
        return
    from logitcache.report.recipe_check import command_of

    for beside in sorted(Path(path).parent.glob("*.yaml")):
        with suppress(RecipeError):  # a YAML file of another kind
            command, entries = command_of(beside), read_recipe(beside)
            cache = entries.get({"precompute": "cache", "derive": "out"}.get(command, ""))
            if cache in missing:
                raise CacheError(f"{cache} does not exist. Fix: logitcache {command} {shlex.quote(str(beside))}")
