"""Accuracy of a cache's teachers, alone and together, from the cache alone.

A `ShardCounter` is a pure function of a shard, and counts add up: shards may be counted anywhere, in any order. They
are added in their own order, so that figures do not depend on the number of workers.
"""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot
from logitcache.errors import CacheError, RecipeError
from logitcache.logits import Logits, TopKLogits
from logitcache.report.inspect import labels_as_seen
from logitcache.report.multi_label_summary import (
    ENSEMBLE,
    Figures,
    MultiLabelTeacher,
    class_columns,
    measure_multi_label,
)
from logitcache.stage_one.cluster.cluster import HERE, Cluster, gathered
from logitcache.store.shards import Shard
from logitcache.student.evaluation.validation import only_logits
from logitcache.targets import Targets
from logitcache.views.datasets.base import Labels, is_multi_label
from logitcache.views.keys import ViewKey

NUMBERS = 1 << 20
"""Probabilities of a teacher that are held at a time."""

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class TeacherCounts:
    """Counts of one teacher's answers, which add up.

    by_class: labelled rows, top-1 and top-5, [C, 3]. entropy and kept: sums over all rows.
    """

    by_class: Counts
    entropy: float
    kept: float | None

    def __add__(self, other: Self) -> Self:
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return type(self)(self.by_class + other.by_class, self.entropy + other.entropy, kept)

    @property
    def totals(self) -> tuple[float, float, float]:
        """Labelled rows, top-1 and top-5."""
        labelled, top1, top5 = self.by_class.sum(axis=0).tolist()
        return labelled, top1, top5

    def accuracy(self, k: Literal[1, 5]) -> float | None:
        """Top-k accuracy on the labelled rows; None without any, and if there are no more than k classes."""
        labelled, top1, top5 = self.totals
        return (top1 if k == 1 else top5) / labelled if labelled and (k == 1 or len(self.by_class) > k) else None


@dataclass(frozen=True)
class ShardCounts:
    """Counts of some rows, which add up: of every teacher, of the ensemble, and how many answers each two share."""

    rows: int
    teachers: Mapping[str, TeacherCounts]
    agreeing: Mapping[tuple[str, str], int]

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.rows + other.rows,
            {name: counts + other.teachers[name] for name, counts in self.teachers.items()},
            {pair: count + other.agreeing[pair] for pair, count in self.agreeing.items()},
        )


@dataclass(frozen=True)
class TeacherSummary:
    """A teacher's top-1 and top-5 on the labelled rows, None without labels, and its mean entropy in nats at T = 1.

    `kept_mass` is the mean probability of the classes that a top-k encoding keeps; None for others.
    """

    teacher: str
    classes: int
    top1: float | None
    top5: float | None
    entropy: float
    kept_mass: float | None


@dataclass(frozen=True)
class Agreement:
    """The fraction of answers that two teachers share: the class of a row; of several classes, each yes and no."""

    first: str
    second: str
    agreement: float


@dataclass(frozen=True)
class CacheSummary:
    """How good the teachers of a cache are, over `views` of it.

    With several teachers of as many classes, their ensemble is listed too: the mean of their probabilities. `per_view`
    and `per_class` have a row a view and a class, with the top-1 (or average precision) of each teacher by name; a
    class has its `name` too, if the cache records it.
    """

    cache: str
    images: int
    views: int
    labelled_row_views: int
    teachers: tuple[TeacherSummary, ...] | tuple[MultiLabelTeacher, ...]
    agreement: tuple[Agreement, ...]
    per_view: tuple[dict[str, Any], ...]
    per_class: tuple[dict[str, Any], ...]


def summarize(path: str | Path, num_views: int | None = None, cluster: Cluster = HERE) -> CacheSummary:
    """Read the first `num_views` views of a finished cache, by default all, and measure its teachers.

    A mixed image has the label of its larger part, as in `inspect`. Memory holds a shard, or, of images of any number
    of classes, a view. Raises CacheError for a cache that is damaged, incomplete or has no logits, RecipeError for more
    views than there are.
    """
    cache = only_logits(open_cache(path))
    if not cache.manifest.teachers:
        raise CacheError(f"{path} keeps features alone, whose accuracy cannot be measured. Fix: keep logits too")
    if num_views is not None and num_views > cache.num_views:
        raise RecipeError(f"--views is {num_views}, {path} has {cache.num_views}. Fix: at most these")
    views = num_views or cache.num_views
    found = (measure_multi_label if is_multi_label(cache.labels) else _measure)(cache, views, cluster)
    return CacheSummary(
        cache=cache.location,
        images=len(cache),
        views=views,
        labelled_row_views=found.labelled,
        teachers=tuple(found.teachers),
        agreement=tuple(Agreement(*pair, share) for pair, share in found.agreement.items()),
        per_view=tuple({"view": view, **row} for view, row in enumerate(found.per_view)),
        per_class=tuple(found.per_class),
    )


def _measure(cache: Cache, views: int, cluster: Cluster) -> Figures:
    shards = [shard for shard in cache.layout.shards() if shard.view < views]
    counted = zip(shards, gathered(ShardCounter(cache.snapshot), shards, "summary", "shards", cluster), strict=True)
    per_view = [
        functools.reduce(operator.add, (counts for _, counts in found))
        for _, found in itertools.groupby(counted, lambda one: one[0].view)
    ]
    total = functools.reduce(operator.add, per_view)
    classes = _classes(cache.manifest)
    classes[ENSEMBLE] = next(iter(classes.values()))
    labelled = int(next(iter(total.teachers.values())).totals[0])
    teachers = [
        TeacherSummary(
            name,
            classes[name],
            found.accuracy(1),
            found.accuracy(5),
            found.entropy / total.rows,
            None if found.kept is None else found.kept / total.rows,
        )
        for name, found in total.teachers.items()
    ]
    agreement = {pair: count / total.rows for pair, count in total.agreeing.items()}
    rows = [{name: found.accuracy(1) for name, found in view.teachers.items()} for view in per_view]
    return Figures(labelled, teachers, agreement, rows, _per_class(total, cache.manifest.class_names))


@dataclass(frozen=True)
class ShardCounter:
    """Count the answers of all teachers, each of which has logits, to the rows of a shard. It can be pickled."""

    snapshot: Snapshot

    def __call__(self, shard: Shard) -> ShardCounts:
        """Count, in few enough rows at a time for dense distributions; raise CacheError if the shard is damaged."""
        size = max(1, NUMBERS // max(_classes(self.snapshot.manifest).values()))
        cache, reader = self._opened
        counts = []
        for start, answers in reader.batches(shard, size):
            keys = [ViewKey(shard.view, index) for index in range(start, min(start + size, shard.stop))]
            counts.append(_count(answers, labels_as_seen(cache, keys)))
        return functools.reduce(operator.add, counts)

    @cached_property
    def _opened(self) -> tuple[Cache, ShardReader]:
        return Cache(self.snapshot), ShardReader(self.snapshot)


def _classes(manifest: Manifest) -> dict[str, int]:
    return {name: entry.num_classes or 0 for name, entry in manifest.teachers.items()}


def _count(answers: Mapping[str, Targets], labels: Labels) -> ShardCounts:
    teachers, best, mean = {}, {}, None
    together = len(answers) > 1 and len({targets.num_classes for targets in answers.values()}) == 1
    for name, targets in answers.items():
        log_p = targets.log_probs()
        best[name] = log_p.argmax(dim=1)
        teachers[name] = _count_teacher(log_p, labels, _kept(targets.compact))
        if together:
            mean = log_p.exp() / len(answers) if mean is None else mean + log_p.exp() / len(answers)
    if mean is not None:
        teachers[ENSEMBLE] = _count_teacher(mean.log(), labels, None)
    agreeing = {(a, b): int((best[a] == best[b]).sum()) for a, b in itertools.combinations(best, 2)}
    return ShardCounts(len(labels), teachers, agreeing)


def _count_teacher(log_p: Tensor, labels: Labels, kept: float | None) -> TeacherCounts:
    """Count log-probabilities [B, C] against labels [B]."""
    ranked = log_p.topk(min(5, log_p.shape[1]), dim=1).indices.numpy()
    known = labels >= 0
    hits = (ranked == labels[:, None])[known]
    columns = [np.ones(len(hits)), hits[:, 0], hits.any(axis=1)]
    counted = [np.bincount(labels[known], column, log_p.shape[1]) for column in columns]
    p = log_p.exp()
    entropy = -(p * log_p.where(p > 0, 0)).sum(dim=1)
    # Not torch's sum, which depends on the number of threads.
    return TeacherCounts(
        np.stack(counted, axis=1).astype(np.float64), float(entropy.numpy().sum(dtype=np.float64)), kept
    )


def _kept(logits: Logits) -> float | None:
    """Return the sum over rows of the probability of the classes that a top-k form keeps; None for other forms."""
    if not isinstance(logits, TopKLogits):
        return None
    return float((1 - logits.tail[:, 0].double().exp()).numpy().sum())


def _per_class(counts: ShardCounts, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return a row for each class that has labelled rows."""
    rows = next(iter(counts.teachers.values())).by_class[:, 0]
    return [
        {
            **class_columns(label, names),
            "row_views": int(rows[label]),
            **{name: found.by_class[label, 1] / rows[label] for name, found in counts.teachers.items()},
        }
        for label in np.flatnonzero(rows).tolist()
    ]
