"""Describe a cache: what made it, how complete, accurate and large it is."""

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.cache.cache import Cache
from logitcache.cache.format.arrays import ArrayGroup
from logitcache.cache.format.manifest import LOGITS, TeacherEntry
from logitcache.cache.format.manifest_diff import is_more
from logitcache.cache.snapshot import Snapshot, open_snapshot, require_sound_skeleton
from logitcache.cache.write.error_summary import errors_of
from logitcache.logits import top1
from logitcache.store.shards import Shard
from logitcache.student.evaluation.multi_label import MultiLabelTally
from logitcache.targets import Targets
from logitcache.views.datasets.base import Labels, is_multi_label
from logitcache.views.keys import ViewKey

ROWS = 4096
LOOKED_AT = 1 << 26
"""Logits, of all classes, that a teacher's accuracy is measured on."""


def inspect_cache(path: str | Path) -> dict[str, Any]:
    """Describe a cache, finished or not, without reading more than one view of it.

    `top1` is the teacher's accuracy on the labelled images of view 0, as it saw them, of the shards that are committed;
    a mixed image has the label of its larger part. `measured_on` has the pixels and the number of rows. Of images
    of any number of classes it is `mean_ap`, the mean average precision, and None if not all logits are kept. Of many
    images and classes the first images stand for all (67,000 of 1,000 classes); `summary` counts all.
    Raises CacheError if more than shards is damaged.
    """
    snapshot = open_snapshot(path)
    require_sound_skeleton(snapshot.store, snapshot.manifest)
    cache = Cache(snapshot)
    manifest, layout, done = cache.manifest, cache.layout, cache.shards
    return {
        "cache": cache.location,
        "complete": cache.complete,
        "shards": layout.num_views * layout.shards_per_view,
        "shards_committed": len(done),
        "bytes": snapshot.store.stored_bytes(),
        "images": manifest.num_images,
        **({} if manifest.appended is None else {"first_images": manifest.first.num_images}),
        "views": manifest.views.num_views,
        "image_shape": list(manifest.image_shape),
        "shard_rows": manifest.shard_rows,
        "seed": manifest.views.seed,
        "augmentations": [
            item.model_dump(mode="json", exclude={"ratio_knots"}) for item in manifest.views.augmentations
        ],
        "mixing": [item.model_dump(mode="json", exclude={"thresholds"}) for item in manifest.views.mixing],
        "targets": manifest.views.targets,
        "decode": manifest.views.decode,
        "dataset": None if manifest.dataset is None else manifest.dataset.model_dump(mode="json"),
        "fingerprint": manifest.fingerprint.content,
        "teachers": {name: _teacher(cache, name, entry, done) for name, entry in manifest.teachers.items()},
        "recorded": None if layout.views is None else _array_bytes(cache, [layout.views], done),
        "growing": _growing(snapshot),
        "identity": manifest.digest(),
        "versions": manifest.versions,
    }


def _growing(snapshot: Snapshot) -> dict[str, Any] | None:
    """Describe what a cache is growing to, and how much of that is committed; None if it is not growing."""
    begun = snapshot.growing()
    goal = begun.manifest
    if not is_more(goal, snapshot.manifest):
        return None
    return {
        "views": goal.views.num_views,
        "images": goal.num_images,
        "targets": [f"{name}.{target}" for name, targets in goal.targets.items() for target in targets],
        "shards": begun.layout.num_shards,
        "shards_committed": len(begun.shards),
    }


def _teacher(cache: Cache, name: str, entry: TeacherEntry, done: list[Shard]) -> dict[str, Any]:
    groups = cache.layout.of(name)
    return {
        "model": entry.model,
        "weights": entry.weights,
        "classes": entry.num_classes,
        "logits": None if entry.logits is None else entry.logits.model_dump(mode="json"),
        "precision": entry.precision,
        **_quality(cache, name, [shard for shard in done if shard.view == 0 and entry.logits is not None]),
        "targets": [_target(cache, entry, group, done) for group in groups],
        "errors": [row for group in groups for row in _errors(cache, entry, group, done)],
        **_array_bytes(cache, groups, done),
    }


def _target(cache: Cache, entry: TeacherEntry, group: ArrayGroup, done: list[Shard]) -> dict[str, Any]:
    """Describe a target: its form, its bytes, and whether its errors are recorded."""
    feature = entry.features.get(group.target)
    stored = entry.stored_logits if feature is None else entry.stored_features[group.target]
    assert stored is not None
    exact = feature is None and entry.error_temperatures == ()
    return {
        "target": group.target,
        "kept": None if feature is None else feature.model_dump(mode="json", exclude_none=True),
        "shape": [entry.num_classes] if feature is None else list(entry.stored_features[group.target].shape),
        "form": stored.form.model_dump(mode="json", exclude_none=True) if feature is None else None,
        "bytes_per_row": _array_bytes(cache, [group], done)["bytes_per_row"],
        "table_bytes": sum(table.num_bytes for table in group.tables),
        "errors": "none" if exact else "recorded" if group.errors is not None else "not recorded",
    }


def _errors(cache: Cache, entry: TeacherEntry, group: ArrayGroup, done: list[Shard]) -> list[dict[str, Any]]:
    """List the errors of a target (its distance from the teacher's answers) by temperature."""
    known = entry.errors_of(group.target) if cache.complete else ()  # over all rows, noted at the end
    errors = known or errors_of(cache.snapshot, group, done)
    return [{"target": group.target, **one.model_dump(mode="json")} for one in errors]


def _array_bytes(cache: Cache, groups: Sequence[ArrayGroup], done: list[Shard]) -> dict[str, Any]:
    """Sum the bytes of the arrays of groups, by their commit records, in all and by row."""
    every = [array for group in groups for array in group.arrays]
    arrays = dict.fromkeys((array.name for array in every), 0)
    for group, shard in itertools.product(groups, done):
        for part in cache.snapshot.stored(group, shard):
            arrays[part.array] += part.size
    rows = sum(shard.stop - shard.start for shard in done)
    return {"array_bytes": arrays, "bytes_per_row": round(sum(arrays.values()) / rows, 1) if rows else None}


def _quality(cache: Cache, teacher: str, shards: list[Shard]) -> dict[str, Any]:
    """Return the accuracy of a teacher on the rows of shards, by the name of the measure, and on which rows."""
    name, measure = ("mean_ap", _mean_ap) if is_multi_label(cache.labels) else ("top1", _accuracy)
    figure, rows = measure(cache, teacher, shards)
    spec = cache.manifest.views.answered()
    names = ", ".join(part.kind for part in (*spec.augmentations, *spec.mixing))
    pixels = f"as augmented by {names}" if names else "not augmented"
    return {name: figure, "measured_on": f"{rows} labelled rows of view 0, {pixels}" if rows else None}


def _accuracy(cache: Cache, teacher: str, shards: list[Shard]) -> tuple[float | None, int]:
    hits = labelled = 0
    for labels, targets in _answers(cache, teacher, shards):
        hits += int((top1(targets).numpy() == labels).sum())
        labelled += int((labels >= 0).sum())
    return hits / labelled if labelled else None, labelled


def _mean_ap(cache: Cache, teacher: str, shards: list[Shard]) -> tuple[float | None, int]:
    labelled, found = 0, []
    for labels, targets in _answers(cache, teacher, shards):
        if targets.keeps_logits:
            found.append(MultiLabelTally.of(targets.logits, torch.from_numpy(labels), {}))
            labelled += int((labels >= 0).any(axis=1).sum())
    return functools.reduce(operator.add, found).measures().mean_ap if found else None, labelled


def _answers(cache: Cache, teacher: str, shards: list[Shard]) -> Iterator[tuple[Labels, Targets]]:
    """Yield labels and answers, some rows at a time, up to a number that takes seconds."""
    only = cache.only({teacher: [LOGITS]}) if shards else cache
    most = -(-LOOKED_AT // (ROWS * (cache.manifest.teachers[teacher].num_classes or 1)))
    starts = ((shard, start) for shard in shards for start in range(shard.start, shard.stop, ROWS))
    for shard, start in itertools.islice(starts, most):
        keys = [ViewKey(shard.view, index) for index in range(start, min(start + ROWS, shard.stop))]
        yield labels_as_seen(cache, keys), only.answers(keys)[teacher]


def labels_as_seen(cache: Cache, keys: list[ViewKey]) -> Labels:
    """Return the labels of views as a teacher saw them; of a mixed image, those of the larger part."""
    labels = cache.labels[[key.index for key in keys]]
    _, height, width = cache.manifest.image_shape
    spec = cache.manifest.views.answered()
    mixture = spec.mixture(keys, cache.manifest.partners(spec), (height, width))
    if mixture is None:
        return labels
    smaller = (mixture.share < 0.5).reshape(-1, *[1] * (labels.ndim - 1))
    return np.where(smaller, cache.labels[mixture.partners], labels).astype(labels.dtype)
