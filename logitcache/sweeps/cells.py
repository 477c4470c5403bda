"""Cells of a sweep: which recipes its grid makes, and how their runs are named."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from logitcache.config.recipe import load_recipe
from logitcache.config.yaml_text import RecipeText
from logitcache.errors import LogitCacheError, RecipeError, did_you_mean, raise_all
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.sweep_recipe import SweepRecipe

ONLY = "student"
"""The name of the cell of a sweep in which nothing but the seed varies."""

_LONGEST = 120
_UNUSUAL = re.compile(r"[^A-Za-z0-9_.,=+-]+")


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep: its name, and what it changes in the student's recipe, by key."""

    name: str
    changes: Mapping[str, JsonValue]


@dataclass(frozen=True, eq=False)
class SweepStudent:
    """A student of a sweep: a cell with a seed, and the recipe of its run."""

    cell: str
    seed: int
    recipe: StudentRecipe

    @property
    def run(self) -> str:
        """The name of the run's folder."""
        return Path(self.recipe.out).name


def members_of(recipe: SweepRecipe, out: Path) -> list[SweepStudent]:
    """Return every student of the cells that a recipe states; raise RecipeError listing every cell that is no recipe.

    Trials of a search come later.
    """
    cells = cells_of(recipe)
    known = [cell.name for cell in cells]
    if recipe.baseline is not None and recipe.baseline not in known:
        raise RecipeError(
            f"baseline {recipe.baseline!r} is no cell.{did_you_mean(recipe.baseline, known)} Fix: one of {known}"
        )
    return members_from(cells, recipe, recipe.all_seeds, out)


def members_from(cells: Sequence[Cell], recipe: SweepRecipe, seeds: Sequence[int], out: Path) -> list[SweepStudent]:
    """Return the students of cells, cell by cell; raise RecipeError listing every cell that is no recipe."""
    errors, members = list[LogitCacheError](), list[SweepStudent]()
    base = recipe.student.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for cell in cells:
        for seed in seeds:
            folder = str(out / "runs" / f"{cell.name},seed={seed}")
            changes = cell.changes | {"seed": seed, "out": folder}  # type: ignore[operator]
            try:
                found = load_recipe(base, StudentRecipe, [f"{key}={json.dumps(to)}" for key, to in changes.items()])
                found.require_entries()
            except RecipeError as error:
                errors.append(RecipeError(f"cell {cell.name}: {error}"))
                break
            members.append(SweepStudent(cell.name, seed, found))
    raise_all(errors)
    return members


def cells_of(recipe: SweepRecipe) -> list[Cell]:
    """Return the cells that a recipe states: the product of its grid, then those beside it."""
    axes = [
        [(f"{title_of(keys, list(recipe.grid))}={label}", change) for label, change in options_of(keys, values).items()]
        for keys, values in recipe.grid.items()
    ]
    cells = [
        named_cell([label for label, _ in point] or [ONLY], [change for _, change in point])
        for point in itertools.product(*axes)
        if axes or not (recipe.cells or recipe.search)
    ]
    cells += [Cell(name, changes) for name, changes in recipe.cells.items()]
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"cells of the same name: {', '.join(twice)}. Fix: other names, or a value once")
    return cells


def named_cell(labels: Sequence[str], changes: Sequence[Mapping[str, JsonValue]]) -> Cell:
    """Return a cell of several changes, named by a label such as `temperature=2` of each."""
    name = ",".join(_UNUSUAL.sub("_", label) for label in labels)
    return Cell(_short(name), {key: to for change in changes for key, to in change.items()})


def options_of(
    keys: str, values: Sequence[JsonValue] | Mapping[str, JsonValue], where: str = "grid"
) -> dict[str, dict[str, JsonValue]]:
    """Return the changes of each value of a key, or of several keys together, by its label.

    `where` is the entry that has the keys, for errors.
    """
    names = [key.strip() for key in keys.split(",")]
    labels = list(values) if isinstance(values, Mapping) else [label_of(value) for value in values]
    labels = [f"{label}~{labels[:n].count(label)}" if label in labels[:n] else label for n, label in enumerate(labels)]
    options = {}
    for label, value in zip(labels, values.values() if isinstance(values, Mapping) else values, strict=True):
        together = value if len(names) > 1 else [value]
        if not isinstance(together, list) or len(together) != len(names):
            raise RecipeError(
                f"{where}.{keys}: {json.dumps(value)} is no list of {len(names)} values, one for each key"
            )
        options[label] = dict(zip(names, together, strict=True))
    return options


def title_of(keys: str, every: Sequence[str]) -> str:
    """Return the shortest end of a key that no other of `every` ends with: `temperature`."""
    first = keys.split(",")[0].strip()
    parts, others = first.split("."), [other.split(",")[0].strip() for other in every if other != keys]
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not parts[-count].isdecimal() and not any(other == end or other.endswith(f".{end}") for other in others):
            return end
    return first


def label_of(value: JsonValue) -> str:
    """Return a short name of a value: itself, the `name` or `kind` of an entry, or those of a list's."""
    if isinstance(value, Mapping):
        return str(value.get("name") or value.get("kind") or hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6])
    if isinstance(value, list):
        return "+".join(map(label_of, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value).strip('"')


def _short(name: str) -> str:
    """Shorten a name that is too long for a file system; a digest keeps it unique."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def parse_grid(texts: Sequence[str], option: str = "--grid") -> dict[str, Any]:
    """Read `KEY=V1,V2` options; values are YAML. Raises RecipeError."""
    grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        parsed = RecipeText({})
        parsed.override(f"values=[{values}]", lambda keys: None)
        if not equals or not key.strip() or parsed.mistakes or not parsed.data.get("values"):
            raise RecipeError(f"{option} {text}: write KEY=V1,V2, such as losses.0.temperature=1,2,4")
        if key.strip() in grid:
            raise RecipeError(f"{option} {text}: {key.strip()} is given twice. Fix: all of its values in one {option}")
        grid[key.strip()] = parsed.data["values"]
    return grid
