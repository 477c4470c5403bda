"""Load the recipe of a command; one of another command is recognised."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from logitcache.config.recipe import Component, load_recipe, read_recipe
from logitcache.errors import RecipeError

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
