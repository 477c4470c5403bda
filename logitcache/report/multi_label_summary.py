"""Accuracy of a cache's teachers on images of any number of classes each: average precision and F1, by view."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot
from logitcache.report.inspect import ROWS, labels_as_seen
from logitcache.stage_one.cluster.cluster import HERE, Cluster, gathered
from logitcache.student.evaluation.multi_label import (
    MultiLabelMeasures,
    MultiLabelTally,
    average_precisions,
    binary_log_probs,
)
from logitcache.targets import Targets
from logitcache.views.keys import ViewKey

ENSEMBLE = "(ensemble)"
"""No teacher can have this name."""


class Figures(NamedTuple):
    """What a summary counts: labelled row-views, figures of each teacher, agreement by pair, rows by view and class."""

    labelled: int
    teachers: Sequence[Any]
    agreement: Mapping[tuple[str, str], float]
    per_view: Sequence[dict[str, float | None]]
    per_class: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class MultiLabelTeacher:
    """A teacher's figures as `evaluate` gives them, each the mean over views; None without labels or all logits."""

    teacher: str
    classes: int | None
    mean_ap: float | None
    f1_macro: float | None
    f1_micro: float | None


class _View(NamedTuple):
    """One view: measures by teacher, average precisions [C] by teacher, and how much each two teachers agree."""

    measures: Mapping[str, MultiLabelMeasures]
    precisions: Mapping[str, NDArray[np.float64]]
    agreement: Mapping[tuple[str, str], float]


def measure_multi_label(cache: Cache, views: int, cluster: Cluster = HERE) -> Figures:
    """Measure the first views of a cache that holds logits alone. Memory holds one view: all its images are ranked.

    Two teachers agree on the answer to a class if both say yes, or both no. A row by class has the mean of its average
    precisions over views, and the number of images that have the class.
    """
    measure = functools.partial(_measure_view, cache.snapshot)
    found = list(gathered(measure, range(views), "summary", "views", cluster))
    names = dict.fromkeys([*cache.manifest.teachers, *found[0].measures])
    pairs = {pair: float(np.mean([view.agreement[pair] for view in found])) for pair in found[0].agreement}
    return Figures(
        views * int((cache.labels >= 0).any(axis=1).sum()),
        [_teacher(name, cache, found) for name in names],
        pairs,
        [{name: measures.mean_ap for name, measures in view.measures.items()} for view in found],
        _per_class(cache, found),
    )


def _measure_view(snapshot: Snapshot, view: int) -> _View:
    """Measure the answers of all teachers to a view; a pure function, for a worker."""
    cache, reader = Cache(snapshot), ShardReader(snapshot)
    shards = (shard for shard in reader.layout.shards() if shard.view == view)
    parts = (_tallies(cache, view, *part) for shard in shards for part in reader.batches(shard, ROWS))
    tallies = functools.reduce(lambda one, other: {name: tally + other[name] for name, tally in one.items()}, parts)
    alone = [name for name in tallies if name != ENSEMBLE]
    return _View(
        {name: tally.measures() for name, tally in tallies.items()},
        {name: average_precisions(tally.logits, tally.labels) for name, tally in tallies.items()},
        {(a, b): float((tallies[a].answers == tallies[b].answers).mean()) for a, b in itertools.combinations(alone, 2)},
    )


def _tallies(cache: Cache, view: int, start: int, answers: Mapping[str, Targets]) -> dict[str, MultiLabelTally]:
    """Tally the answers to rows from `start` of each teacher whose logits are all kept, and of their ensemble."""
    logits = {name: targets.logits for name, targets in answers.items() if targets.keeps_logits}
    if not logits:
        return {}
    count = len(next(iter(logits.values())))
    keys = [ViewKey(view, index) for index in range(start, start + count)]
    labels = torch.from_numpy(labels_as_seen(cache, keys))
    if len(logits) > 1 and len({value.shape for value in logits.values()}) == 1:
        yes, no = binary_log_probs(list(logits.values()))
        logits[ENSEMBLE] = yes - no
    return {name: MultiLabelTally.of(value, labels, {}) for name, value in logits.items()}


def _teacher(name: str, cache: Cache, found: list[_View]) -> MultiLabelTeacher:
    measures = [view.measures[name] for view in found if name in view.measures]
    entry = cache.manifest.teachers.get(name, next(iter(cache.manifest.teachers.values())))
    figures = ([getattr(item, figure) for item in measures] for figure in ("mean_ap", "f1_macro", "f1_micro"))
    return MultiLabelTeacher(name, entry.num_classes, *map(_mean, figures))


def _per_class(cache: Cache, found: list[_View]) -> list[dict[str, Any]]:
    images = (cache.labels == 1).sum(axis=0)
    return [
        {
            **class_columns(label, cache.manifest.class_names),
            "images": int(images[label]),
            **{name: _mean([view.precisions[name][label] for view in found]) for name in found[0].precisions},
        }
        for label in np.flatnonzero(images).tolist()
    ]


def class_columns(label: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Return the columns that identify a class: its number, and its name if the cache records names."""
    return {"label": label} | ({} if names is None or label >= len(names) else {"name": names[label]})


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else None
