"""Which kind of recipe a file is, and whether it is valid."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from logitcache.cache.cache import Cache
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.config.mistakes import validate
from logitcache.config.recipe import Component, load_recipe, load_sound, read_recipe, require_effect
from logitcache.errors import LogitCacheError, RecipeError, caught, listed
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.derive.source import Source as Derived
from logitcache.stage_one.inputs import require_teachers
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.student.lesson import lesson_of
from logitcache.student.target_errors import doubts
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.trial import require_fit, require_taps

RECIPES: dict[str, type[Component]] = {
    "precompute": PrecomputeRecipe,
    "derive": DeriveRecipe,
    "train-student": StudentRecipe,
    "train-teacher": TeacherRecipe,
}

R = TypeVar("R", bound=Component)


@dataclass(frozen=True)
class CheckedRecipe:
    """One file: the command it is for, what is wrong with it, None when nothing is, and what is to be known of it."""

    path: str
    command: str | None
    error: str | None
    warnings: tuple[str, ...] = ()


def check_recipes(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> list[CheckedRecipe]:
    """Validate recipes of any kind, and report every mistake in them.

    A student is also built and tried with its cache, and a derivation compared with its source, if that exists.
    """
    return [_check(path, overrides) for path in paths]


def _check(path: str | Path, overrides: Sequence[str]) -> CheckedRecipe:
    command = None
    try:
        command = command_of(path)
        recipe, mistakes = load_sound(path, RECIPES[command], overrides)
    except LogitCacheError as error:
        return CheckedRecipe(str(path), command, str(error))
    # What is wrong with names in caches is reported beside entries that are wrong by themselves.
    mistakes += [] if recipe is None else dict.fromkeys(str(error) for error in _problems(recipe))
    if mistakes or recipe is None:
        return CheckedRecipe(str(path), command, listed(mistakes))
    return CheckedRecipe(str(path), command, None, _warnings(recipe))


def _warnings(recipe: Component) -> tuple[str, ...]:
    """Return what is to be known of a sound recipe: targets of an existing cache that are far from the teacher's."""
    if not isinstance(recipe, StudentRecipe) or not locate(recipe.cache).path.exists():
        return ()
    return tuple(doubts(recipe, Cache(Snapshot.read(locate(recipe.cache)))))


def _problems(recipe: Component) -> list[LogitCacheError]:
    """List what is wrong with a recipe that is sound by itself: options without effect, and names in caches."""
    epochs = recipe.epochs if isinstance(recipe, TrainingRecipe) else math.inf
    return [*caught(lambda: require_effect(recipe, epochs)), *_UNFIT.get(type(recipe), lambda recipe: [])(recipe)]


def _unfit_student(recipe: StudentRecipe) -> list[LogitCacheError]:
    """List losses that the cache cannot serve and how the student does not fit it, if the cache exists."""
    store = locate(recipe.cache)
    if recipe.model is None or not store.path.exists():
        return caught(recipe.require_entries)
    try:
        cache = Cache(Snapshot.read(store))
    except LogitCacheError as error:
        return [error]
    found = caught(lambda: require_fit(recipe, lesson_of(recipe, cache)))
    return [*found, *caught(lambda: require_taps(recipe, cache))] if found else []


def _unfit_derivation(recipe: DeriveRecipe) -> list[LogitCacheError]:
    store = locate(recipe.cache)
    return caught(lambda: Derived.of(recipe, Snapshot.read(store))) if store.path.exists() else []


_UNFIT: dict[type[Component], Callable[[Any], list[LogitCacheError]]] = {
    PrecomputeRecipe: lambda recipe: caught(lambda: require_teachers(recipe.teachers)),
    DeriveRecipe: _unfit_derivation,
    StudentRecipe: _unfit_student,
    TeacherRecipe: lambda recipe: caught(recipe.require_entries),
}


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
