"""Sections of a report on a cache: its teachers, views, encoding errors and provenance."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from logitcache.cache.cache import Cache, open_uncompared
from logitcache.errors import LogitCacheError
from logitcache.report import figures
from logitcache.report.answers import class_names, label_names, probabilities
from logitcache.report.images import views_as_seen
from logitcache.report.inspect import inspect_cache, labels_as_seen
from logitcache.report.page.maps import compared, maps
from logitcache.report.page.page import Section, Table
from logitcache.report.summary import summarize
from logitcache.student.evaluation.alignment import only_comparable
from logitcache.student.evaluation.validation import only_logits
from logitcache.views.datasets.base import is_multi_label
from logitcache.views.keys import ViewKey

_NUM_PICTURES = 12


def sections_of_cache(
    path: str, points: int, overrides: Sequence[str] = (), trust: Collection[str] = ()
) -> Iterator[Section]:
    """Yield the sections of a finished cache. Raises CacheError."""
    cache = open_uncompared(path)
    logits, described = only_logits(cache), inspect_cache(path)
    if logits.manifest.teachers:
        yield _teachers(path)
        yield _views(logits, overrides, trust)
    if errors := list(_encoding_errors(described)):
        yield Section("Encoding errors", "What the stored form of an answer loses, and its bytes.", errors)
    if logits.manifest.teachers and not is_multi_label(cache.labels):
        yield _representations(cache, logits, points)
    tables = [
        Table("cache", [{"key": key, "value": str(value)} for key, value in described.items() if _is_scalar(value)])
    ]
    tables.append(Table("versions", [described["versions"]]))
    yield Section("Provenance of the cache", "", (), tables, [("all of inspect", json.dumps(described, indent=2))])


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _teachers(path: str) -> Section:
    """Return accuracy of the teachers in all, by view and by class."""
    found = summarize(path)
    tables = [Table("teachers", [asdict(row) for row in found.teachers])]
    if found.agreement:
        tables.append(Table("agreement", [asdict(row) for row in found.agreement]))
    drawn = []
    names = [row.teacher for row in found.teachers]
    by_view = [
        {"view": row["view"], "teacher": name, "accuracy": row[name]}
        for row in found.per_view
        for name in names
        if row.get(name) is not None
    ]
    if found.views > 1 and by_view:
        drawn.append(figures.curves(by_view, "accuracy", "view", "teacher", title="accuracy by view"))
    rows = [{**row, "name": str(row.get("name", row["label"]))} for row in found.per_class]
    if measured := [name for name in names if any(row.get(name) is not None for row in rows)]:
        drawn.append(figures.per_class(rows, measured))
    return Section("Teachers", f"{found.images} images, {found.views} views.", drawn, tables)


def _encoding_errors(described: dict[str, Any]) -> Iterator[figures.Figure]:
    """Yield the errors of logits by temperature, and of features, with the bytes of a row."""
    rows = [
        {
            "target": f"{teacher}.{row['target']} ({sizes[row['target']]:.3g} B)",
            "bytes_per_row": sizes[row["target"]],
            **row,
        }
        for teacher, entry in described["teachers"].items()
        if (sizes := {one["target"]: one["bytes_per_row"] for one in entry["targets"]})
        for row in entry["errors"]
    ]
    logits = [{**row, "series": row["target"]} for row in rows if row["temperature"] is not None and row["mean"] > 0]
    if logits:
        yield figures.curves(
            logits,
            "mean",
            "temperature",
            "target",
            title="KL(full ‖ stored), nats",
            caption="Mean over all rows. In brackets the bytes of a row.",
            log=True,
        )
    features = [row for row in rows if row["temperature"] is None]
    if features:
        drawn = [{"target": row["target"], "bytes": row["bytes_per_row"], "error": row["mean"]} for row in features]
        yield figures.pareto(
            [{**row, "fidelity": 1 - row["error"]} for row in drawn],
            "bytes",
            "fidelity",
            "target",
            title="1 − squared error over squares of features",
        )


def _views(cache: Cache, overrides: Sequence[str], trust: Collection[str]) -> Section:
    """Return pictures of a few images as the teacher saw them, with its most probable classes."""
    title = "Views as the teacher saw them"
    some = np.random.default_rng(0).choice(len(cache), min(_NUM_PICTURES, len(cache)), replace=False)
    keys = [ViewKey(number % cache.num_views, int(index)) for number, index in enumerate(np.sort(some))]
    names = class_names(cache)
    try:
        views = views_as_seen(cache, overrides, trust)
        answers = {name: probabilities(cache, targets) for name, targets in cache.answers(keys).items()}
    except LogitCacheError as error:
        return Section(title, f"The images cannot be shown: {error}")
    drawn = []
    for row, (key, pixels) in enumerate(zip(keys, views.__getitems__(keys), strict=True)):
        tops = [(name, [int(c) for c in np.argsort(-p[row])[:3]], p[row]) for name, p in answers.items()]
        lines = [f"label: {', '.join(label_names(cache, key)) or 'none'}"]
        lines += [f"{name}: " + ", ".join(f"{names[c]} {100 * p[c]:.0f} %" for c in best) for name, best, p in tops]
        drawn.append(
            figures.picture(pixels.numpy(), title=f"view {key.view}, image {key.index}", caption="\n".join(lines))
        )
    return Section(title, "A seeded choice.", drawn)


def _representations(cache: Cache, logits: Cache, points: int) -> Section:
    """Return similarity and maps of what the teachers answered to view 0 of a seeded choice of images."""
    some = np.sort(np.random.default_rng(0).choice(len(cache), min(points, len(cache)), replace=False))
    keys = [ViewKey(0, int(index)) for index in some]
    kept = only_comparable(cache)
    named = {name: targets.log_probs().numpy() for name, targets in logits.answers(keys).items()}
    for name, targets in () if kept is None else kept.answers(keys).items():
        named |= {f"{name}.{feature}": _flat(values.float().numpy()) for feature, values in targets.features.items()}
    labels = labels_as_seen(cache, keys)
    names = cache.manifest.class_names
    classes = ["no label" if label < 0 else str(label) if names is None else names[label] for label in labels]
    text = f"{len(keys)} images in view 0: log-probabilities, and features as means over places."
    return Section("Representations of the teachers", text, [*compared(named), *maps(named, classes)])


def _flat(values: Any) -> Any:
    return values.reshape(*values.shape[:2], -1).mean(axis=2) if values.ndim > 2 else values
