"""Completion by the shell: names of recipes, keys of a recipe, teachers of a cache. Reads text alone; never fails."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer import Context


def recipe_names(incomplete: str) -> list[str]:
    """Return shipped recipes and their folders that begin so."""
    from logitcache.config.shipped_recipes import shipped_recipes

    names = {part for recipe in shipped_recipes() for part in (recipe.name, recipe.name.partition("/")[0])}
    return sorted(name for name in names if name.startswith(incomplete))


def settings(ctx: Context, incomplete: str) -> list[str]:
    """Return what --set may begin with: `key=` of the recipe, and `losses.0.teacher=NAME` of its cache's teachers."""
    from logitcache.config.recipe import read_recipe
    from logitcache.errors import LogitCacheError

    # While --set lacks its value, the words before it are not parsed.
    files = [str(word) for word in (ctx.params.get("recipe"), *ctx.args) if str(word).endswith((".yaml", ".yml"))]
    try:
        recipe = read_recipe(files[0])
    except (LogitCacheError, LookupError):
        return []
    found = [f"{key}=" for key in _keys(recipe, "")]
    if "losses" in recipe:
        losses = range(len(recipe["losses"]))
        found += [f"losses.{number}.teacher={name}" for number in losses for name in _teachers(recipe.get("cache"))]
    return [text for text in found if text.startswith(incomplete)]


def teachers(ctx: Context, incomplete: str) -> list[str]:
    """Return the teachers of the command's cache."""
    for cache in (ctx.params.get("cache"), *ctx.args):
        if found := _teachers(cache):
            return [name for name in found if name.startswith(incomplete)]
    return []


def _keys(entries: object, prefix: str) -> Iterator[str]:
    items = entries.items() if isinstance(entries, Mapping) else enumerate(entries) if isinstance(entries, list) else ()
    for key, value in items:
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def _teachers(cache: Any) -> list[str]:
    """Return the teachers of a cache on this machine; none of what cannot be read."""
    try:
        attributes = json.loads((Path(cache).expanduser() / "zarr.json").read_text())["attributes"]
        return list(attributes["logitcache"]["teachers"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
