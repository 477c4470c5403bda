"""How good the teachers of a cache are on images of any number of classes each, view by view, from the cache alone."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot
from logitcache.report.inspect import ROWS, labels_as_seen
from logitcache.stage_one.cluster.gather_values import HERE, Cluster, gathered
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

Tallies = dict[str, MultiLabelTally]


@dataclass(frozen=True)
class MultiLabelTeacher:
    """A teacher's figures as `evaluate` gives them, each the mean over views; None without labels or all logits."""

    teacher: str
    classes: int | None
    mean_ap: float | None
    f1_macro: float | None
    f1_micro: float | None


@dataclass(frozen=True)
class LabelAgreement:
    """The fraction of answers, of every row and class, that are yes from both of two teachers, or no from both."""

    first: str
    second: str
    agreement: float


@dataclass(frozen=True)
class MultiLabelSummary:
    """What the answers in a cache are worth, over `views` of them.

    With several teachers their ensemble stands among them: the mean of their probabilities. `per_view` and `per_class`
    have a row a view and a class, with the average precision of each teacher by name; a class's is the mean over views,
    and `images` are those known to be of it.
    """

    cache: str
    images: int
    views: int
    labelled_row_views: int
    teachers: tuple[MultiLabelTeacher, ...]
    agreement: tuple[LabelAgreement, ...]
    per_view: tuple[dict[str, Any], ...]
    per_class: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _View:
    """What a view says: figures by teacher, average precisions [C] by teacher, and how much each two agree."""

    measures: Mapping[str, MultiLabelMeasures]
    precisions: Mapping[str, NDArray[np.float64]]
    agreement: Mapping[tuple[str, str], float]


def summarize_multi_label(cache: Cache, views: int, cluster: Cluster = HERE) -> MultiLabelSummary:
    """Read the first views of a cache that holds logits alone, one at a time; one of them is held in memory.

    Average precision ranks all images of a view.
    """
    counter = _ViewCounter(cache.snapshot)
    found = list(gathered(counter, range(views), "summary", "views", cluster))
    known = cache.labels >= 0
    names = dict.fromkeys([*cache.manifest.teachers, *found[0].measures])
    return MultiLabelSummary(
        cache=cache.location,
        images=len(cache),
        views=views,
        labelled_row_views=views * int(known.any(axis=1).sum()),
        teachers=tuple(_teacher(name, cache, found) for name in names),
        agreement=tuple(
            LabelAgreement(*pair, float(np.mean([view.agreement[pair] for view in found])))
            for pair in found[0].agreement
        ),
        per_view=tuple(
            {"view": number, **{name: measures.mean_ap for name, measures in view.measures.items()}}
            for number, view in enumerate(found)
        ),
        per_class=tuple(_per_class(cache, found)),
    )


@dataclass(frozen=True)
class _ViewCounter:
    """Measure the answers of all teachers to a view. It can be pickled."""

    snapshot: Snapshot

    def __call__(self, view: int) -> _View:
        cache, reader = Cache(self.snapshot), ShardReader(self.snapshot)
        shards = (shard for shard in reader.layout.shards() if shard.view == view)
        parts = (_tallies(cache, view, *part) for shard in shards for part in reader.batches(shard, ROWS))
        return _measured(functools.reduce(_joined, parts))


def _measured(tallies: Tallies) -> _View:
    alone = [name for name in tallies if name != ENSEMBLE]
    return _View(
        {name: tally.measures() for name, tally in tallies.items()},
        {name: average_precisions(tally.logits, tally.labels) for name, tally in tallies.items()},
        {(a, b): float((tallies[a].answers == tallies[b].answers).mean()) for a, b in itertools.combinations(alone, 2)},
    )


def _tallies(cache: Cache, view: int, start: int, answers: Mapping[str, Targets]) -> Tallies:
    """Take the answers of all teachers whose logits are all kept, and of all of them together, to rows from `start`."""
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


def _joined(first: Tallies, second: Tallies) -> Tallies:
    return {name: tally + second[name] for name, tally in first.items()}


def _teacher(name: str, cache: Cache, found: list[_View]) -> MultiLabelTeacher:
    measures = [view.measures[name] for view in found if name in view.measures]
    entry = cache.manifest.teachers.get(name, next(iter(cache.manifest.teachers.values())))
    return MultiLabelTeacher(
        name,
        entry.num_classes,
        _mean([item.mean_ap for item in measures]),
        _mean([item.f1_macro for item in measures]),
        _mean([item.f1_micro for item in measures]),
    )


def _per_class(cache: Cache, found: list[_View]) -> Iterator[dict[str, Any]]:
    """Yield a row for each class that an image is known to be of."""
    images = (cache.labels == 1).sum(axis=0)
    for label in np.flatnonzero(images).tolist():
        precisions = {name: _mean([v.precisions[name][label] for v in found]) for name in found[0].precisions}
        yield {"label": label, **name_of(label, cache.manifest.class_names), "images": int(images[label]), **precisions}


def name_of(label: int, names: Sequence[str] | None) -> dict[str, str]:
    """Return the column that holds the name of a class; none if it is not recorded."""
    return {} if names is None or label >= len(names) else {"name": names[label]}


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else None
