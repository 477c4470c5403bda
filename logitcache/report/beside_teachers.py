"""A run beside the teachers that it learnt from: what each costs."""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from logitcache.cache.format.derivation import network_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import locate, read_manifest
from logitcache.config.trust import require_grant
from logitcache.errors import CacheError, LogitCacheError, RecipeError, RefusedError, RemoteError
from logitcache.models import Checkpoint, Classifier, Model
from logitcache.report.recipe_check import load_own
from logitcache.runtime.console import logger
from logitcache.runtime.device import own_randomness, resolve_device
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.student.evaluation.cost import Contender, LatencyPlan
from logitcache.student.evaluation.evaluate import EvaluationResult, evaluate, is_stated, read_run, require_known_source
from logitcache.student.training_recipes import LiveTeacher, StudentRecipe
from logitcache.teacher.online import names_code, recorded_risks

_MODEL: TypeAdapter[Model] = TypeAdapter(Model)


def evaluate_beside_teachers(
    run: Path,
    overrides: Sequence[str] = (),
    latency: LatencyPlan | None = None,
    teachers_from: Path | None = None,
) -> EvaluationResult:
    """Measure a run as `evaluate` does, and weigh the teachers whose networks its cache tells how to build.

    Their weights do not matter for it: they are random, and nothing is downloaded. Models of the user's own code are
    built if the user names them: by `teachers_from`, the precompute recipe, or by `--set teachers.NAME={model: …}`.
    """
    teachers, left_out = _teachers(run, overrides, teachers_from)
    return replace(evaluate(run, overrides, latency=latency, teachers=teachers), teachers_left_out=left_out)


def teachers_of(path: Path, cache: str) -> dict[str, LiveTeacher]:
    """Return the models that a precompute recipe names for teachers of a cache; raise RecipeError if there are none."""
    held = read_manifest(locate(cache)).teachers
    named = {name: source for name, source in load_own(path, PrecomputeRecipe).teachers.items() if name in held}
    found = {
        name: LiveTeacher(model=source.model, preprocessing=source.preprocessing)
        for name, source in named.items()
        if source.model is not None
    }
    if not found:
        raise RecipeError(
            f"{path} names no model of a teacher of {cache}, which has {sorted(held)}. Fix: name the recipe that "
            "filled the cache"
        )
    return found


def _teachers(
    run: Path, overrides: Sequence[str], teachers_from: Path | None
) -> tuple[dict[str, Contender | None], dict[str, str]]:
    """Build the teachers of the cache that a run learnt from; return also why some cannot be."""
    recipe = read_run(run, overrides)
    if not isinstance(recipe, StudentRecipe):
        return {}, {}
    try:
        require_known_source(Path(run), recipe, overrides)
        manifest = read_manifest(locate(recipe.cache))
    except (CacheError, RefusedError, RemoteError):
        return {}, {}  # `evaluate` reports why
    stated = {} if teachers_from is None else dict(teachers_of(teachers_from, recipe.cache))
    stated |= {n: t for n, t in recipe.teachers.items() if is_stated(f"teachers.{n}.model.factory", overrides)}
    built: dict[str, Contender | None] = {}
    left_out: dict[str, str] = {}
    for name in manifest.teachers:
        try:
            built[name] = _built(name, manifest, recipe, stated.get(name))
        except LogitCacheError as error:
            logger.info(f"teacher {name!r} is neither weighed nor timed: {error}")
            built[name], left_out[name] = None, str(error)
    return built, left_out


def _built(name: str, manifest: Manifest, recipe: StudentRecipe, stated: LiveTeacher | None) -> Contender:
    entry, device = manifest.teachers[name], resolve_device(recipe.device)
    model = _recorded(name, manifest, recipe.trust) if stated is None else stated.model
    # Of a network with other outputs too, only a checkpoint says how many it has.
    own = model.num_classes if isinstance(model, Checkpoint) else None
    with own_randomness(device, 0):
        built = model.architecture().build(entry.num_classes if entry.classes is None else own, manifest.image_shape[0])
    return Contender(Classifier(built.module, entry.preprocessing).to(device), entry.precision)


def _recorded(name: str, manifest: Manifest, trust: Collection[str]) -> Model:
    entry = manifest.teachers[name]
    model = network_of(name, entry)
    if model is None or names_code(model):
        raise RecipeError(
            "it was built by the user's own code, and a cache never names code to run. "
            "Fix: --teachers-from the precompute recipe, or "
            f"--set 'teachers.{name}={{model: {{kind: custom, factory: …}}}}'"
        )
    try:
        found = _MODEL.validate_json(json.dumps(model))
    except ValidationError as error:
        raise CacheError(f"its model in the cache cannot be read: {error.errors()[0]['msg']}") from error
    require_grant(recorded_risks(found, entry), manifest.digest(), trust, "its entry in the cache")
    return found
