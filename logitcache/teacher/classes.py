"""A teacher of more classes than the data set: which of its outputs are kept."""

import json
import re
from collections.abc import Mapping

from logitcache.errors import MismatchError, RecipeError
from logitcache.models import Transformers
from logitcache.teacher.teacher import TeacherSource
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.datasets.images.labels import class_index, listed_classes

SHOWN = 3


def outputs_of(name: str, source: TeacherSource, dataset: ImageDataset) -> tuple[int, ...] | None:
    """Return the output of a teacher's network for each class of a data set, in their order; None if all are kept.

    Raises RecipeError listing the classes that are missing, unknown or named twice.
    """
    given, names, count = source.classes, dataset.class_names or (), dataset.num_classes
    if isinstance(given, dict):
        return _by_name(f"teachers.{name}.classes", given, names, count)
    if given is not None and count not in (None, len(given)):
        raise RecipeError(
            f"teachers.{name}.classes lists {len(given)} outputs, the data set has {count} classes.\n"
            f"  Fix: one output for each of its {listed_classes(names, count)}, in their order"
        )
    if given is None and isinstance(source.model, Transformers):
        _require_order(name, source.model.labels, names)
    return given


def _require_order(name: str, labels: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Raise RecipeError if the labels of a zero-shot teacher are the names of the classes in another order."""
    if labels != names and sorted(labels) == sorted(names):
        first = next(place for place, (one, other) in enumerate(zip(labels, names, strict=True)) if one != other)
        raise RecipeError(
            f"teachers.{name}.model.labels are the classes of the data set in another order: label {first} is "
            f"{labels[first]!r}, class {first} is {names[first]!r}.\n  Fix: labels: {json.dumps(list(names))}"
        )


def _by_name(where: str, given: Mapping[str, int], names: tuple[str, ...], count: int | None) -> tuple[int, ...]:
    if count is None:
        raise RecipeError(
            f"{where} names classes, and the images have none.\n  Fix: a list of outputs, {where}: {[*given.values()]}"
        )
    found: dict[int, str] = {}
    problems = []
    for key in given:
        try:
            index = class_index(key, names, count)
        except ValueError as error:
            problems.append(str(error))
            continue
        if index in found:
            problems.append(f"{found[index]!r} and {key!r} are the same class.")
        found.setdefault(index, key)
    if missing := [repr(names[index]) if names else str(index) for index in range(count) if index not in found]:
        some = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        problems.append(f"No output for {len(missing)} of {count} classes: {some}.")
    if problems:
        raise RecipeError(
            "\n  ".join([f"{where} does not give an output for each class of the data set:", *problems])
            + f"\n  Fix: each of its {listed_classes(names, count)} once, by name or index"
        )
    return tuple(given[found[index]] for index in range(count))


def other_classes(name: str, num_classes: int, dataset: ImageDataset) -> MismatchError:
    """Return the refusal of a teacher of other classes than the data set, with the line that chooses among more."""
    names, count = dataset.class_names, dataset.num_classes or 0
    fixes = [
        f"point teachers.{name}.model at a checkpoint fine-tuned on these classes",
        "keep its features alone (logits: null, no grad_cam)",
        "or read the images without labels",
    ]
    if num_classes > count:
        keys = [_written(key) for key in names or map(str, range(count))]
        line = ", ".join(f"{key}: OUTPUT" for key in keys[:SHOWN]) + (", …" if count > SHOWN else "")
        fixes.insert(
            0,
            f"teachers.{name}.classes: {{{line}}}, with the number from 0 to {num_classes - 1} of the teacher's output "
            "for each class in place of OUTPUT",
        )
    return MismatchError(
        f"teacher {name!r} predicts {num_classes} classes, the data set has {count}.\n  Fix: " + ";\n  ".join(fixes)
    )


def _written(text: str) -> str:
    """Write a key of a mapping in YAML, in quotes if it needs them."""
    return text if re.fullmatch(r"\w[\w.-]*", text) else json.dumps(text)
