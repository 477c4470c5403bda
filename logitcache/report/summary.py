"""How good the teachers of a cache are, alone and together: from the cache alone, shard by shard.

A `ShardCounter` is a pure function of a shard, and counts add up: shards may be counted anywhere, in any order. They
are added in theirs, so that figures do not depend on who counts.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

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
from logitcache.report.multi_label_summary import ENSEMBLE, MultiLabelSummary, name_of, summarize_multi_label
from logitcache.stage_one.cluster.gather_values import HERE, Cluster, gathered
from logitcache.store.arrays import Shard
from logitcache.student.evaluation.validation import only_logits
from logitcache.targets import Targets
from logitcache.views.datasets.base import Labels, is_multi_label
from logitcache.views.keys import ViewKey

NUMBERS = 1 << 20
"""Probabilities of a teacher that are held at a time."""

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
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


@dataclass(frozen=True)
class ShardCounts:
    """Counts of some rows, which add up: of every teacher, of the ensemble, and how many answers each two share."""

    rows: int
    teachers: Mapping[str, Answered]
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
    """The fraction of rows for which two teachers name the same class."""

    first: str
    second: str
    agreement: float


@dataclass(frozen=True)
class CacheSummary:
    """What the answers in a cache are worth, over `views` of them.

    With several teachers of as many classes, their ensemble stands among them: the mean of their probabilities.
    `per_view` and `per_class` have a row a view and a class, with the top-1 of each teacher by name; a class has its
    `name` too, if the cache records it.
    """

    cache: str
    images: int
    views: int
    labelled_row_views: int
    teachers: tuple[TeacherSummary, ...]
    agreement: tuple[Agreement, ...]
    per_view: tuple[dict[str, Any], ...]
    per_class: tuple[dict[str, Any], ...]


def summarize(
    path: str | Path, num_views: int | None = None, cluster: Cluster = HERE
) -> CacheSummary | MultiLabelSummary:
    """Read the first `num_views` views of a finished cache, by default all, and measure its teachers.

    A mixed image has the label of its larger part, as in `inspect`. Memory holds a shard, or, of images of any number
    of classes, a view. Raises CacheError for a cache that is damaged, incomplete or has no logits, RecipeError for more
    views than there are.
    """
    cache = only_logits(open_cache(path))
    if not cache.manifest.teachers:
        raise CacheError(f"{path} keeps features alone, whose accuracy nothing tells. Fix: keep logits too")
    if num_views is not None and num_views > cache.num_views:
        raise RecipeError(f"--views is {num_views}, {path} has {cache.num_views}. Fix: at most these")
    views = num_views or cache.num_views
    if is_multi_label(cache.labels):
        return summarize_multi_label(cache, views, cluster)
    chosen = list(itertools.takewhile(lambda shard: shard.view < views, cache.layout.shards()))
    counter = ShardCounter(cache.snapshot)
    counted = zip(chosen, gathered(counter, chosen, "summary", "shards", cluster), strict=True)
    total: ShardCounts | None = None
    per_view = []
    for view, shards in itertools.groupby(counted, lambda one: one[0].view):
        found = functools.reduce(operator.add, (counts for _, counts in shards))
        total = found if total is None else total + found
        per_view.append({"view": view, **_top1_of_all(found)})
    assert total is not None
    return _summary(cache, views, total, tuple(per_view))


@dataclass(frozen=True)
class ShardCounter:
    """Count the answers of all teachers, each of which has logits, to the rows of a shard. It can be pickled."""

    snapshot: Snapshot

    def __call__(self, shard: Shard) -> ShardCounts:
        """Count, a few rows at a time; raise CacheError where the shard is damaged."""
        return functools.reduce(operator.add, self._parts(shard))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCounter, (self.snapshot,)

    def _parts(self, shard: Shard) -> Iterator[ShardCounts]:
        """Cut a shard into few enough rows for a dense distribution of each teacher."""
        size = max(1, NUMBERS // max(_classes(self.snapshot.manifest).values()))
        for start, answers in self._reader.batches(shard, size):
            keys = [ViewKey(shard.view, index) for index in range(start, min(start + size, shard.stop))]
            yield _count(answers, labels_as_seen(self._cache, keys))

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.snapshot)

    @cached_property
    def _cache(self) -> Cache:
        return Cache(self.snapshot)


def _classes(manifest: Manifest) -> dict[str, int]:
    return {name: entry.num_classes or 0 for name, entry in manifest.teachers.items()}


def _count(answers: Mapping[str, Targets], labels: Labels) -> ShardCounts:
    teachers, best, mean = {}, {}, None
    together = len(answers) > 1 and len({targets.num_classes for targets in answers.values()}) == 1
    for name, targets in answers.items():
        log_p = targets.log_probs()
        best[name] = log_p.argmax(dim=1)
        teachers[name] = _answered(log_p, labels, _kept(targets.compact))
        if together:
            mean = log_p.exp() / len(answers) if mean is None else mean + log_p.exp() / len(answers)
    if mean is not None:
        teachers[ENSEMBLE] = _answered(mean.log(), labels, None)
    agreeing = {(a, b): int((best[a] == best[b]).sum()) for a, b in itertools.combinations(best, 2)}
    return ShardCounts(len(labels), teachers, agreeing)


def _answered(log_p: Tensor, labels: Labels, kept: float | None) -> Answered:
    """Count log-probabilities [B, C] against labels [B]."""
    ranked = log_p.topk(min(5, log_p.shape[1]), dim=1).indices.numpy()
    known = labels >= 0
    hits = (ranked == labels[:, None])[known]
    columns = [np.ones(len(hits)), hits[:, 0], hits.any(axis=1)]
    counted = [np.bincount(labels[known], column, log_p.shape[1]) for column in columns]
    p = log_p.exp()
    entropy = -(p * log_p.where(p > 0, 0)).sum(dim=1)
    # Not torch's sum, which depends on the number of threads.
    return Answered(np.stack(counted, axis=1).astype(np.float64), float(entropy.numpy().sum(dtype=np.float64)), kept)


def _kept(logits: Logits) -> float | None:
    """Return the sum over rows of the probability of the classes that a top-k form keeps; None for other forms."""
    if not isinstance(logits, TopKLogits):
        return None
    return float((1 - logits.tail[:, 0].double().exp()).numpy().sum())


def _summary(cache: Cache, views: int, counts: ShardCounts, per_view: tuple[dict[str, Any], ...]) -> CacheSummary:
    classes = _classes(cache.manifest)
    classes |= {ENSEMBLE: next(iter(classes.values()))}
    return CacheSummary(
        cache=cache.location,
        images=len(cache),
        views=views,
        labelled_row_views=int(next(iter(counts.teachers.values())).totals[0]),
        teachers=tuple(_teacher(name, classes[name], found, counts.rows) for name, found in counts.teachers.items()),
        agreement=tuple(Agreement(*pair, count / counts.rows) for pair, count in counts.agreeing.items()),
        per_view=per_view,
        per_class=tuple(_per_class(counts, cache.manifest.class_names)),
    )


def _teacher(name: str, classes: int, found: Answered, rows: int) -> TeacherSummary:
    labelled, top1, top5 = found.totals
    kept = None if found.kept is None else found.kept / rows
    return TeacherSummary(name, classes, _share(top1, labelled), _share(top5, labelled), found.entropy / rows, kept)


def _share(count: float, total: float) -> float | None:
    return count / total if total else None


def _top1_of_all(counts: ShardCounts) -> dict[str, float | None]:
    """Return each teacher's top-1 by name."""
    return {name: _share(found.totals[1], found.totals[0]) for name, found in counts.teachers.items()}


def _per_class(counts: ShardCounts, names: Sequence[str] | None) -> Iterable[dict[str, Any]]:
    """Yield a row for each class that has labelled rows, with its name if that is recorded."""
    rows = next(iter(counts.teachers.values())).by_class[:, 0]
    for label in np.flatnonzero(rows).tolist():
        top1 = {name: found.by_class[label, 1] / rows[label] for name, found in counts.teachers.items()}
        yield {"label": label, **name_of(label, names), "row_views": int(rows[label]), **top1}
