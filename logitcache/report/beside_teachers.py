"""Evaluate runs and exported files beside their teachers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.root import read_manifest
from logitcache.cache.snapshot import locate
from logitcache.config.recipe import is_stated
from logitcache.config.trust import require_grant
from logitcache.errors import CacheError, LogitCacheError, RecipeError, RefusedError, RemoteError
from logitcache.models import Checkpoint, Classifier
from logitcache.report.load_own import load_own
from logitcache.runtime.console import logger
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.shipping.exported import is_exported
from logitcache.shipping.model_table import ModelTable, compare_models
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.student.evaluation.cost import Contender, LatencyPlan
from logitcache.student.evaluation.evaluate import EvaluationResult, evaluate
from logitcache.student.evaluation.open_run import read_run, require_known_source
from logitcache.student.live_teacher import LiveTeacher
from logitcache.student.training_recipes import StudentRecipe
from logitcache.teacher.online import recorded_risks, recorded_source

R = TypeVar("R", EvaluationResult, ModelTable)


def evaluate_beside_teachers(
    run: Path,
    overrides: Sequence[str] = (),
    latency: LatencyPlan | None = None,
    teachers_from: Path | None = None,
) -> EvaluationResult:
    """Evaluate a run, and report the cost of its teachers too, if their networks can be built.

    Teachers get random weights, which do not matter for it; nothing is downloaded. Models of the user's own code are
    built if the user names them: by `teachers_from`, the precompute recipe, or by `--set teachers.NAME={model: …}`. If
    one of these cannot be built or run, the result names it in `teachers_failed`. Raises RecipeError for a run without
    teachers, and for names that its cache does not have; CacheError if the cache of named teachers is gone.
    """
    built, left_out, named = _teachers(run, overrides, teachers_from)
    return _explained(evaluate(run, overrides, latency=latency, teachers=built), left_out, named)


def compare_beside_teachers(
    models: Sequence[Path],
    overrides: Sequence[str] = (),
    latency: LatencyPlan | None = None,
    teachers_from: Path | None = None,
) -> ModelTable:
    """Compare runs, exported files and the teachers of the first run in one table.

    With exported files all are measured on the CPU, which runs them. Raises as `evaluate_beside_teachers`.
    """
    runs = [model for model in models if not is_exported(model)]
    changes = list(overrides) if len(runs) == len(models) else [*overrides, "device=cpu"]
    if teachers_from is not None and not runs:
        raise RecipeError("exported files name no teachers. Fix: name the run too, or leave out --teachers-from")
    built, left_out, named = _teachers(runs[0], changes, teachers_from) if runs else ({}, {}, ())
    return _explained(compare_models(models, changes, latency=latency, teachers=built), left_out, named)


def _explained(result: R, left_out: Mapping[str, str], named: Collection[str]) -> R:
    """Add, and print, why teachers are neither counted nor timed."""
    left_out = {**left_out, **result.teachers_left_out}
    for name, reason in left_out.items():
        logger.info(f"teacher {name!r} is neither counted nor timed: {reason}")
    return replace(result, teachers_left_out=left_out, teachers_failed=tuple(sorted(left_out.keys() & named)))


def teachers_of(path: Path, cache: str) -> dict[str, LiveTeacher]:
    """Return the models that a precompute recipe names for teachers of a cache; raise RecipeError if there are none."""
    held = read_manifest(locate(cache)).teachers
    named = {name: source for name, source in load_own(path, PrecomputeRecipe).teachers.items() if name in held}
    found = {name: LiveTeacher(model=s.model, preprocessing=s.preprocessing) for name, s in named.items() if s.model}
    if not found:
        raise RecipeError(
            f"{path} names no model of a teacher of {cache}, which has {sorted(held)}. Fix: name the recipe that "
            "filled the cache"
        )
    return found


def _teachers(
    run: Path, overrides: Sequence[str], teachers_from: Path | None
) -> tuple[dict[str, Contender | None], dict[str, str], Collection[str]]:
    """Build the teachers of a run's cache; return them, by name why others cannot be built, and names that users gave.

    Raises what `evaluate_beside_teachers` does.
    """
    recipe = read_run(run, overrides)
    if not isinstance(recipe, StudentRecipe):
        if teachers_from is not None:
            raise RecipeError(f"{run} learnt from labels, and has no teachers. Fix: leave out --teachers-from")
        return {}, {}, ()
    stated = {n: t for n, t in recipe.teachers.items() if is_stated(f"teachers.{n}.model.factory", overrides)}
    try:
        require_known_source(Path(run), recipe, overrides)
        manifest = read_manifest(locate(recipe.cache))
    except (CacheError, RefusedError, RemoteError):
        if stated or teachers_from is not None:
            raise
        return {}, {}, ()  # `evaluate` reports why
    if unknown := sorted(stated.keys() - manifest.teachers.keys()):
        known = sorted(manifest.teachers)
        raise RecipeError(f"teachers: {unknown} are none of {recipe.cache}, which has {known}. Fix: name these")
    stated = ({} if teachers_from is None else teachers_of(teachers_from, recipe.cache)) | stated
    built: dict[str, Contender | None] = {}
    left_out: dict[str, str] = {}
    for name in manifest.teachers:
        try:
            built[name] = _built(name, manifest, recipe, stated.get(name))
        except LogitCacheError as error:
            built[name], left_out[name] = None, str(error)
    return built, left_out, stated.keys()


def _built(name: str, manifest: Manifest, recipe: StudentRecipe, stated: LiveTeacher | None) -> Contender:
    """Build a teacher's network with random weights: that of the user's entry, or the recorded one."""
    entry, device = manifest.teachers[name], resolve_device(recipe.device)
    model = recorded_source(name, entry).model if stated is None else stated.model
    assert model is not None
    if stated is None:
        require_grant(recorded_risks(model, entry), manifest.digest(), recipe.trust, "its entry in the cache")
    # A network with other outputs too has a number of classes of its own, which only a checkpoint states.
    num_outputs = model.num_classes if isinstance(model, Checkpoint) else None
    with own_randomness(device, 0):
        built = model.architecture().build(
            entry.num_classes if entry.classes is None else num_outputs, manifest.image_shape[0]
        )
    own = None if recipe.pairing is None else manifest.image_shape
    return Contender(Classifier(built.module, entry.preprocessing).to(device), entry.precision, own)
