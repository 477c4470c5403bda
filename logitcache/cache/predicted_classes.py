"""Names of the classes that the teachers of a cache predict, if the sources of their networks know them."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

from pydantic import ValidationError

from logitcache.cache.format.derivation import network_of
from logitcache.cache.format.manifest import TeacherEntry
from logitcache.errors import LogitCacheError
from logitcache.models import Timm, Torchvision, Transformers

Names = tuple[str, ...]

_KNOWING: Mapping[str, type[Timm] | type[Torchvision] | type[Transformers]] = {
    "timm": Timm,
    "torchvision": Torchvision,
    "transformers": Transformers,
}
"""Kinds of models that know names of classes without a download or a file that a cache names."""


def predicted_classes(teachers: Iterable[TeacherEntry], num_classes: int) -> Names | None:
    """Return the names of the classes of all teachers that predict `num_classes`; None unless known and the same."""
    found = {_class_names(entry) for entry in teachers if entry.num_classes == num_classes}
    names = found.pop() if len(found) == 1 else None
    return names if names is not None and len(names) == num_classes else None


def _class_names(entry: TeacherEntry) -> Names | None:
    """Return the names of the logits of a teacher; nothing that its entry names is built, called or opened."""
    names = None
    # Entries of another release of logitcache or of a library, of a library that is missing, or of a mean: no names.
    with suppress(LogitCacheError, ValidationError, RecursionError):
        model = network_of("", entry)
        kind = _KNOWING.get(str(model.get("kind"))) if isinstance(model, dict) else None
        names = None if kind is None else kind.model_validate_json(json.dumps(model)).class_names()
    if names is None or entry.classes is None:
        return names
    return tuple(names[output] for output in entry.classes) if max(entry.classes) < len(names) else None
