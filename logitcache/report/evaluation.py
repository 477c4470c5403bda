"""A run beside the teachers that it learnt from: what each costs."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from logitcache.cache.derivation import network_of
from logitcache.cache.manifest import Manifest
from logitcache.cache.snapshot import locate, read_manifest
from logitcache.console import say
from logitcache.device import own_randomness, resolve_device
from logitcache.errors import CacheError, LogitCacheError, RecipeError, RefusedError, RemoteError
from logitcache.models import Classifier, Model
from logitcache.student.cost import Contender, LatencyPlan
from logitcache.student.evaluation import EvaluationResult, evaluate, is_stated, read_run, require_known_source
from logitcache.student.recipes import StudentRecipe
from logitcache.teacher.online import names_code, recorded_risks
from logitcache.trust import require_grant

_MODEL: TypeAdapter[Model] = TypeAdapter(Model)


def evaluate_beside_teachers(
    run: Path, overrides: Sequence[str] = (), latency: LatencyPlan | None = None
) -> EvaluationResult:
    """Measure a run as `evaluate` does, and weigh the teachers whose networks its cache tells how to build.

    Their weights do not matter for it: they are random, and nothing is downloaded. Models of the user's own code are
    built by the user's own word, `--set teachers.NAME={model: {kind: custom, factory: …}}`.
    """
    return evaluate(run, overrides, latency=latency, teachers=_teachers(run, overrides))


def _teachers(run: Path, overrides: Sequence[str]) -> dict[str, Contender | None]:
    recipe = read_run(run, overrides)
    if not isinstance(recipe, StudentRecipe):
        return {}
    try:
        require_known_source(Path(run), recipe, overrides)
        manifest = read_manifest(locate(recipe.cache))
    except (CacheError, RefusedError, RemoteError):
        return {}  # as `evaluate` tells
    return {name: _built(name, manifest, recipe, overrides) for name in manifest.teachers}


def _built(name: str, manifest: Manifest, recipe: StudentRecipe, overrides: Sequence[str]) -> Contender | None:
    entry, given = manifest.teachers[name], recipe.teachers.get(name)
    stated = given is not None and is_stated(f"teachers.{name}.model.factory", overrides)
    device = resolve_device(recipe.device)
    try:
        model = given.model if given is not None and stated else _recorded(name, manifest, recipe.trust)
        with own_randomness(device, 0):
            built = model.architecture().build(entry.num_classes, manifest.image_shape[0])
    except LogitCacheError as error:
        say(f"teacher {name!r} is not weighed: {error}")
        return None
    return Contender(Classifier(built.module, entry.preprocessing).to(device), entry.precision)


def _recorded(name: str, manifest: Manifest, trust: Collection[str]) -> Model:
    entry = manifest.teachers[name]
    model = network_of(name, entry)
    if model is None or names_code(model):
        raise RecipeError(
            "it was built by the user's own code, and a cache never names code to run. "
            f"Fix: --set 'teachers.{name}={{model: {{kind: custom, factory: …}}}}'"
        )
    try:
        found = _MODEL.validate_json(json.dumps(model))
    except ValidationError as error:
        raise CacheError(f"its model in the cache cannot be read: {error.errors()[0]['msg']}") from error
    require_grant(recorded_risks(found, entry), manifest.digest(), trust, "its entry in the cache")
    return found
