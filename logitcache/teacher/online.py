"""The live teacher: the same answers as the cache, computed on a student's own batches."""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from logitcache.cache.encodings.dense import Dense
from logitcache.cache.format.derivation import network_of
from logitcache.cache.format.manifest import TeacherEntry
from logitcache.cache.format.root import read_manifest
from logitcache.cache.snapshot import locate
from logitcache.config.trust import require_grant
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.models import Model, Preprocessing, weights_digest
from logitcache.runtime.device import resolve_device
from logitcache.targets import Targets
from logitcache.teacher.teacher import TeacherSource, build_teacher, take_recorded

_INSTEAD = "give the teacher yourself, as `teachers:` in the student's recipe"
MOST_CLASSES = 1 << 20
"""Classes of a network that a manifest may have built."""


class LiveSource(Protocol):
    """The user's own entry for a teacher that a cache alone cannot rebuild."""

    @property
    def model(self) -> Model: ...
    @property
    def preprocessing(self) -> Preprocessing | None: ...


def live_targets(
    cache: str,
    device: str = "auto",
    sources: Mapping[str, LiveSource] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    trust: Collection[str] = (),
) -> Callable[[Tensor, Tensor], Mapping[str, Targets]]:
    """Rebuild the teachers of the cache at a path, to answer a student's own batches (`--online`): pixels and labels.

    `sources` are the user's own entries, needed for models of the user's code; `modules` the modules themselves;
    `trust` has the digests of caches that may name checkpoints and hubs. Raises MismatchError if a teacher is not
    the one that filled the cache, RefusedError for one that only the user may name.
    """
    manifest = read_manifest(locate(cache))
    identity = manifest.digest()
    unknown = sorted((sources or {}).keys() - manifest.teachers.keys())
    if unknown:
        raise RecipeError(
            f"teachers {unknown} are not in {cache}, which has {sorted(manifest.teachers)}. Fix: use these names"
        )
    teachers = []
    for name, entry in manifest.teachers.items():
        given, module = (sources or {}).get(name), (modules or {}).get(name)
        source = _source(name, entry, given, modules)
        if given is None and source.model is not None:
            require_grant(
                recorded_risks(source.model, entry), identity, trust, f"teacher {name!r} of {cache}", _INSTEAD
            )
        channels = manifest.image_shape[0]
        teacher = build_teacher(
            name, source, module, entry.num_classes, channels, resolve_device(device), entry.classes
        )
        weights, preprocessing = weights_digest(teacher.classifier.module), teacher.classifier.preprocessing
        for key, value in {"weights": weights, "preprocessing": preprocessing}.items():
            if value != getattr(entry, key):
                raise MismatchError(
                    f"teachers.{name}.{key}: the cache has {getattr(entry, key)!r}, the live teacher {value!r}. "
                    "Fix: give the teacher that filled the cache"
                )
        take_recorded(teacher, entry, manifest.image_shape)
        teachers.append(teacher)
    return lambda pixels, labels: {teacher.name: teacher(pixels, labels) for teacher in teachers}


def _source(
    name: str, entry: TeacherEntry, given: LiveSource | None, modules: Mapping[str, nn.Module] | None
) -> TeacherSource:
    """Return the user's own source of a teacher, else the recorded one, to answer all that the cache keeps."""
    kept: dict[str, Any] = {"logits": None if entry.logits is None else Dense(), "features": entry.features}
    if given is None and name not in (modules or {}):
        return recorded_source(name, entry).model_copy(update=kept)
    model, preprocessing = (None, None) if given is None else (given.model, given.preprocessing)
    preprocessing = preprocessing or entry.preprocessing
    return TeacherSource(model=model, preprocessing=preprocessing, precision=entry.precision, **kept)


def recorded_source(name: str, entry: TeacherEntry) -> TeacherSource:
    """Read a teacher's source from the manifest, which never names code to run."""
    model = network_of(name, entry)
    recorded = {
        "model": model,
        "preprocessing": entry.preprocessing.model_dump(mode="json"),
        "precision": entry.precision,
    }
    try:
        source = TeacherSource.model_validate_json(json.dumps(recorded))
    except ValidationError as error:
        raise CacheError(
            f"teachers.{name}.model in the cache cannot be read: {error.errors()[0]['msg']}. "
            f"Fix: give `teachers: {{{name}: …}}` in the student's recipe"
        ) from error
    if source.model is None or names_code(model):
        raise RecipeError(
            f"teacher {name!r} was built by the user's own code, and a cache never names code to run. "
            f"Fix: --teachers-from the precompute recipe, or give `teachers: {{{name}: …}}` in the student's recipe or "
            "by --set"
        )
    return source


def recorded_risks(model: Model, entry: TeacherEntry) -> tuple[str, ...]:
    """Name what only a user may have built of a recorded teacher."""
    many = entry.num_classes is not None and entry.num_classes > MOST_CLASSES
    return (*model.risks(), *([f"{entry.num_classes} classes"] if many else []))


def names_code(model: JsonValue) -> bool:
    """Say whether the entry of a model, or of one inside it, names a factory to call."""
    if not isinstance(model, dict):
        return False
    return model.get("factory") is not None or any(names_code(value) for value in model.values())
