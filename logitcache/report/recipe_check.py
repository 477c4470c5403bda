"""Check recipes of any kind, and find the command that a recipe is for."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from logitcache.cache.cache import Cache
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.config.mistakes import validate
from logitcache.config.recipe import NOWHERE, Component, load_recipe, load_sound, read_recipe, require_effect
from logitcache.errors import LogitCacheError, RecipeError, caught, listed, raise_all
from logitcache.report.load_own import load_own
from logitcache.runtime.console import logger
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.derive.source import SourceCache
from logitcache.stage_one.inputs import require_teachers
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.stage_one.synthesize.networks import require_teacher
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe
from logitcache.student.compatibility import inexact_targets
from logitcache.student.evaluation.class_names import mapped_labels
from logitcache.student.lesson import Lesson, lesson_of, lesson_of_images, pairing_of, require_live
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.trial import require_fit, require_taps
from logitcache.sweeps.cells import members_of, parse_grid
from logitcache.sweeps.search.search import require_sound
from logitcache.sweeps.sweep_recipe import SweepRecipe, as_sweep
from logitcache.teacher.classes import outputs_of
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.datasets.torchvision import Torchvision
from logitcache.views.spec import Views

RECIPES: dict[str, type[Component]] = {
    "precompute": PrecomputeRecipe,
    "synthesize": SynthesizeRecipe,
    "derive": DeriveRecipe,
    "train-student": StudentRecipe,
    "train-teacher": TeacherRecipe,
    "sweep": SweepRecipe,
}

Check = Callable[[], object]


@dataclass(frozen=True)
class CheckedRecipe:
    """One file: its command, its error or None, and warnings."""

    path: str
    command: str | None
    error: str | None
    warnings: tuple[str, ...] = ()


def check_recipes(paths: Iterable[str | Path], overrides: Sequence[str] = ()) -> list[CheckedRecipe]:
    """Validate recipes of any kind, and report every mistake in them.

    A student is also built and tried with its cache, a teacher with its data set, and a derivation compared with its
    source, if these exist.
    """
    return [_check(path, overrides) for path in paths]


def _check(path: str | Path, overrides: Sequence[str]) -> CheckedRecipe:
    command = None
    try:
        command, stated = command_of(path), read_recipe(path).keys()
        recipe, mistakes = load_sound(path, RECIPES[command], overrides)
    except LogitCacheError as error:
        return CheckedRecipe(str(path), command, str(error))
    # Wrong names in caches are reported beside entries that are wrong by themselves.
    mistakes += [] if recipe is None else dict.fromkeys(str(error) for error in _problems(recipe, stated))
    if mistakes or recipe is None:
        return CheckedRecipe(str(path), command, listed(mistakes))
    return CheckedRecipe(str(path), command, None, _warnings(recipe))


def _warnings(recipe: Component) -> tuple[str, ...]:
    """Return warnings of a valid recipe: targets of an existing cache that are far from the teacher's."""
    if not isinstance(recipe, StudentRecipe) or not locate(recipe.cache).path.exists():
        return ()
    cache = Cache(Snapshot.read(locate(recipe.cache)))
    return tuple(inexact_targets(recipe.losses, recipe.ensembles, cache))


def _problems(recipe: Component, stated: Collection[str]) -> list[LogitCacheError]:
    """List the mistakes of a recipe that is valid by itself: options without effect, and names in caches.

    `stated` are the keys of the file: of these an entry that is wrong is left out, and not missing.
    """
    epochs = recipe.epochs if isinstance(recipe, TrainingRecipe) else math.inf
    return caught(lambda: require_effect(recipe, epochs), *_CHECKS[type(recipe)](recipe, stated))


def _checks_of_student(recipe: StudentRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield checks of the entries, of what the cache can serve, and of how the student fits it, if the cache exists."""
    yield lambda: recipe.require_entries(stated)
    if not locate(recipe.cache).path.exists():
        return
    try:
        cache = Cache(Snapshot.read(locate(recipe.cache)))
        pairing = pairing_of(recipe, cache)
    except LogitCacheError as error:
        yield partial(raise_all, [error])
        return
    yield lambda: require_live(recipe, cache)
    if unfit := caught(lambda: _require_fit(recipe, lesson_of(recipe, cache, pairing))):
        yield partial(raise_all, unfit)
        if recipe.model is not None:
            yield lambda: require_taps(recipe, cache, pairing)


def _checks_of_teacher(recipe: TeacherRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield checks of the entries, and of how the model fits the data set, if it can be opened here."""
    yield lambda: recipe.require_entries(stated)
    if (dataset := _opened(recipe.dataset, "the model is not tried")) is not None:
        yield lambda: _require_fit(recipe, lesson_of_images(recipe, Views(dataset, recipe.views())))


def _require_fit(recipe: TrainingRecipe, lesson: Lesson) -> None:
    """Raise if the model fails on what it learns from, or `class_map` names no class of the images or the model."""
    validation = recipe.validation
    checks: list[Check] = [] if recipe.model is None else [lambda: require_fit(recipe, lesson)]
    if validation is not None and (mapped := validation.class_map) is not None:
        dataset = _opened(validation.dataset, "validation.class_map is not compared")
        checks += [] if dataset is None else [lambda: mapped_labels(dataset, mapped, lesson.num_classes)]
    raise_all(caught(*checks))


def _checks_of_precompute(recipe: PrecomputeRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield checks of the entries, and of the names of classes, if the data set can be opened here."""
    if "teachers" not in stated:
        yield lambda: require_teachers(recipe.teachers)
    named = {name: source for name, source in recipe.teachers.items() if source.classes is not None}
    if named and (dataset := _opened(recipe.dataset, "`classes` are not compared")) is not None:
        yield from (partial(outputs_of, name, source, dataset) for name, source in named.items())


def _checks_of_derivation(recipe: DeriveRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield the comparison with the source, if it exists."""
    if (store := locate(recipe.cache)).path.exists():
        yield lambda: SourceCache.of(recipe, Snapshot.read(store))


def _checks_of_synthesis(recipe: SynthesizeRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield the check that there is a teacher; it is not built, as its weights might be downloaded."""
    yield lambda: require_teacher(recipe)


def _checks_of_sweep(recipe: SweepRecipe, stated: Collection[str]) -> Iterator[Check]:
    """Yield checks of every cell by itself, and of every choice and end of a range of a search, with the first seed."""
    try:
        members = members_of(recipe, Path(NOWHERE)) + require_sound(recipe)
    except RecipeError as error:
        yield partial(raise_all, [error])
        return
    for member in {member.cell: member for member in reversed(members)}.values():
        yield from _checks_of_student(member.recipe, ("model", "dataset"))


def _opened(entry: object, otherwise: str) -> ImageDataset | None:
    """Open a data set of a recipe; None if there is none, or if it is not here, which is reported.

    A check downloads nothing.
    """
    if isinstance(entry, Torchvision):
        entry = entry.model_copy(update={"download": False})
    try:
        return None if entry is None else open_dataset(entry)
    except LogitCacheError as error:
        logger.info(f"{otherwise}, as the data set cannot be opened here: {error}")
        return None


_CHECKS: dict[type[Component], Callable[[Any, Collection[str]], Iterator[Check]]] = {
    PrecomputeRecipe: _checks_of_precompute,
    SynthesizeRecipe: _checks_of_synthesis,
    DeriveRecipe: _checks_of_derivation,
    StudentRecipe: _checks_of_student,
    TeacherRecipe: _checks_of_teacher,
    SweepRecipe: _checks_of_sweep,
}


def command_of(path: str | Path) -> str:
    """Find the command whose keys a recipe has, with the fewest mistakes. Raises RecipeError."""
    data = read_recipe(path)
    command = min(RECIPES, key=lambda command: misfit(data, RECIPES[command]))
    if not data.keys() & RECIPES[command].model_fields.keys():
        raise RecipeError(
            f"{path}:1: no recipe has these keys; `precompute` needs teachers, `synthesize` teacher, `derive` cache, "
            "out and teachers, `train-student` cache and model, `train-teacher` dataset and model, "
            "`sweep` kind and student"
        )
    return command


def next_recipe(path: Path) -> tuple[str, ...]:
    """Return the command and the file that follow a precompute recipe: the next of its folder; empty if it is alone."""
    found = sorted(path.parent.glob("*.yaml"))
    for following in found[found.index(path) + 1 :] if path in found else ():
        with suppress(RecipeError):  # a YAML file of another kind
            return command_of(following), str(following)
    return ()


def load_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    trust: Sequence[str] = (),
    grid: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
    seeds: int | None = None,
    baseline: str | None = None,
) -> SweepRecipe:
    """Load the recipe of a sweep, or that of a student, and add what the command line varies.

    Entries of `search` replace those of the recipe.
    """
    added = dict(search or {})
    varied = {"grid": parse_grid(grid), "seeds": seeds, "baseline": baseline}
    varied |= {"search": {"kind": "random"} | added if added else {}}
    granted = f"trust=[{', '.join(trust)}]"
    if read_recipe(path).get("kind") != "sweep":
        student = load_own(path, StudentRecipe, [*overrides, f"out={NOWHERE}", *[granted] * bool(trust)])
        return load_recipe(as_sweep(student, **varied), SweepRecipe)
    recipe = load_own(path, SweepRecipe, [*overrides, *[f"student.{granted}"] * bool(trust)])
    changes = {key: value for key, value in varied.items() if value}
    stated = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if added:
        changes["search"] = {"kind": "random"} | (stated.get("search") or {}) | added
    return load_recipe(stated | changes, SweepRecipe) if changes else recipe


def misfit(data: Mapping[str, Any], model: type[Component]) -> tuple[int, int]:
    """Count the keys that a kind of recipe does not have, which decide, and all mistakes as one of that kind."""
    return len(data.keys() - model.model_fields.keys()), len(validate(data, model)[1])
