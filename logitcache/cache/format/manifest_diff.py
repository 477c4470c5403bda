"""Compare two manifests: whether a recipe continues a cache, adds to it, or makes another one."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from logitcache.cache.format.manifest import LOGITS, Manifest, TeacherEntry
from logitcache.config.recipe import Component
from logitcache.errors import MismatchError
from logitcache.reductions import ChannelLayout

Outputs = tuple[int, ...] | None

_AS_READ: Mapping[ChannelLayout, ChannelLayout] = {"channels_last": "channels_first", "channels_first": "tokens"}
"""How releases without layouts read taps of maps [H, W, C] and of tokens [D, N]: as they are."""


def extends(wanted: Manifest, recorded: Manifest) -> bool:
    """Whether the wanted cache has all that is recorded, and possibly more views, teachers, features or images."""
    return not _differences(recorded, wanted) and not _lacks(recorded, wanted)


def is_more(wanted: Manifest, recorded: Manifest) -> bool:
    """Whether the wanted cache has more views, teachers, features or images than are recorded."""
    return bool(_adds(recorded, wanted))


def require_growth(recorded: Manifest, wanted: Manifest, where: str) -> None:
    """Raise MismatchError with every difference that keeps a recipe from continuing or extending a cache."""
    lines = _differences(recorded, wanted)
    lacks = _lacks(recorded, wanted)
    # More views, teachers and features are allowed; list them only if others are missing, to show that they differ.
    if lines or lacks:
        raise MismatchError(
            f"{where} was made by another recipe:\n  "
            + "\n  ".join([*lines, *lacks, *(_adds(recorded, wanted) if lacks else [])])
            + f"\n  Fix: {_fix_of_layouts(recorded, wanted)}{_fix_of_answers(recorded, wanted)}"
            "change the recipe back to continue this cache (it may add views, teachers and features), or give the new "
            "one another `cache:` path"
        )


def _fix_of_layouts(recorded: Manifest, wanted: Manifest) -> str:
    """Return the recipe entries that continue a cache of a release which read every tap as [C, H, W] or [N, D]."""
    entries = []
    for name in recorded.teachers.keys() & wanted.teachers.keys():
        old, new = recorded.teachers[name].features, wanted.teachers[name].features
        common = old.keys() & new.keys()
        kept = {n: _AS_READ[new[n].layout] for n in sorted(common) if old[n].layout == "auto" != new[n].layout}
        if kept:
            listed = ", ".join(f"{feature}: {{layout: {layout}}}" for feature, layout in kept.items())
            entries.append(f"teachers.{name}.features: {{{listed}}}")
    return f"{'; '.join(sorted(entries))}; these read a tap as releases without layouts did. Else " if entries else ""


def _fix_of_answers(recorded: Manifest, wanted: Manifest) -> str:
    """Return the fix for an imported teacher whose files of answers have changed."""
    names = [
        f"teachers.{name}"
        for name in sorted(recorded.teachers.keys() & wanted.teachers.keys())
        if recorded.teachers[name].weights != wanted.teachers[name].weights
        and all(_is_imported(manifest.teachers[name]) for manifest in (recorded, wanted))
    ]
    return (
        f"other files are another {names[0]}, also if they repeat these answers: import all of them into another "
        "`cache:` path, which asks nobody again. Else "
        if names
        else ""
    )


def _is_imported(entry: TeacherEntry) -> bool:
    return isinstance(entry.model, dict) and entry.model.get("kind") == "answers"


def _differences(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List differences in what a cache can never change."""
    is_grown = recorded.num_images != wanted.num_images
    lines = ["images: the cache began with others"] if is_grown and recorded.first != wanted.first else []
    for key in type(recorded.views).model_fields:
        old, new = getattr(recorded.views, key), getattr(wanted.views, key)
        if old != new and key != "num_views":
            lines.append(f"views.{key}: the cache has {short(old)}, the recipe {short(new)}")
    if recorded.image_shape != wanted.image_shape:
        lines.append(f"view shape: the cache has {recorded.image_shape}, the recipe gives {wanted.image_shape}")
    for key in ("shard_rows", "row_checksums", "parameters"):
        old, new = getattr(recorded, key), getattr(wanted, key)
        if old != new:
            lines.append(f"{key}: the cache has {short(old)}, the recipe {short(new)}")
    for name in sorted(recorded.teachers.keys() & wanted.teachers.keys()):
        lines += _teacher_differences(name, recorded.teachers[name], wanted.teachers[name])
    return lines


def _teacher_differences(name: str, recorded: TeacherEntry, wanted: TeacherEntry) -> list[str]:
    pairs = [
        (key, getattr(recorded, key), getattr(wanted, key))
        for key in ("weights", "preprocessing", "precision", "speed")
    ]
    if recorded.logits is not None and wanted.logits is not None:
        pairs += [(key, getattr(recorded, key), getattr(wanted, key)) for key in ("num_classes", LOGITS)]
    common = [feature for feature in recorded.features if feature in wanted.features]
    pairs += [(_key(feature), recorded.features[feature], wanted.features[feature]) for feature in common]
    if recorded.num_classes is not None and wanted.num_classes is not None:
        pairs += _other_outputs(recorded.classes, wanted.classes)
    return [f"teachers.{name}.{key}: the cache has {short(a)}, the recipe {short(b)}" for key, a, b in pairs if a != b]


def _other_outputs(recorded: Outputs, wanted: Outputs) -> list[tuple[str, Any, Any]]:
    """Return the first class whose network output differs; all outputs if only one manifest selects them."""
    if recorded is None or wanted is None:
        return [("classes", recorded, wanted)]
    pairs = enumerate(zip(recorded, wanted, strict=False))
    return [(f"classes[{number}]", old, new) for number, (old, new) in pairs if old != new][:1]


def _lacks(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List what the cache has and the recipe does not name."""
    old, new = recorded.views.num_views, wanted.views.num_views
    lines = [f"views.num_views: the cache has {old}, the recipe {new}"] if new < old else []
    old, new = recorded.num_images, wanted.num_images
    lines += [f"images: the cache has {old}, the data set {new}"] if new < old else []
    return lines + [f"{name}: only in the cache" for name in _only(recorded, wanted)]


def _adds(recorded: Manifest, wanted: Manifest) -> list[str]:
    """List what the recipe names and the cache does not have."""
    old, new = recorded.views.num_views, wanted.views.num_views
    lines = [f"views.num_views: the cache has {old}, the recipe {new}"] if new > old else []
    old, new = recorded.num_images, wanted.num_images
    lines += [f"images: the cache has {old}, the data set {new}"] if new > old else []
    return lines + [f"{name}: only in the recipe" for name in _only(wanted, recorded)]


def _only(one: Manifest, other: Manifest) -> Iterator[str]:
    """Yield the recipe keys of teachers and targets that the other manifest does not have."""
    for name, targets in one.targets.items():
        if name not in other.targets:
            yield f"teachers.{name}"
            continue
        for target in targets:
            if target not in other.targets[name]:
                yield f"teachers.{name}.{_key(target)}"


def _key(target: str) -> str:
    return target if target == LOGITS else f"features.{target}"


def short(value: object) -> str:
    """Format a setting for a message."""
    if isinstance(value, tuple):
        return "[" + ", ".join(short(item) for item in value) + "]"
    if isinstance(value, Component):
        text = json.dumps(value.model_dump(mode="json", exclude={"ratio_knots", "thresholds"}))
        return text if len(text) < 200 else text[:200] + "…"
    return repr(value)
