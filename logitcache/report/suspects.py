"""Suspects: labels that confident teachers contradict over many views.

With p the mean over teachers and views of a row's probabilities, and y its label, the score of a label is its
normalised margin

    (1 + p[y] - max_{c != y} p[c]) / 2,

in [0, 1], low if another class is more probable: `normalized_margin` of cleanlab. A label is suspect if another class c
is the most probable one and p[c] reaches that class's threshold, the mean of p[c] over the images that are labelled c
(Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", JAIR 70, 2021, equation 2;
which uses out-of-sample probabilities). A teacher that was trained on these images and labels has learnt some of the
wrong labels: the ranking orders images for review and proves nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_uncompared
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.errors import DataError, RecipeError
from logitcache.report.answers import class_names
from logitcache.report.figures.base import as_csv
from logitcache.report.figures.picture import picture
from logitcache.report.images import views_as_seen
from logitcache.report.page.page import Section, write_page
from logitcache.runtime.console import logger, track
from logitcache.store.files import write_atomically
from logitcache.store.shards import Shard
from logitcache.student.evaluation.validation import only_logits
from logitcache.views.datasets.base import Labels, is_multi_label
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

NUMBERS = 1 << 20
"""Probabilities of a teacher that are held at a time."""

_SHEET = 200
"""Images of a contact sheet at most."""


@dataclass(frozen=True)
class Suspects:
    """The suspect labels of a cache, lowest score first; `labelled` images were looked at over `views`.

    A row has the image's index and id (None if the images are not there), its label, the class that the teachers give
    it, the score, the mean probability of both, and `contradicted`, the share of answers whose first class is not the
    label.
    """

    cache: str
    teachers: tuple[str, ...]
    labelled: int
    views: int
    suspects: int
    rows: tuple[dict[str, Any], ...]
    csv: str | None = None
    sheet: str | None = None


class _Columns(NamedTuple):
    """Of each row [N]: mean probability of the label and of the best other class, that class, contradicting share."""

    label: NDArray[np.float64]
    other: NDArray[np.float64]
    suggested: NDArray[np.int64]
    contradicted: NDArray[np.float64]


def rank(
    labels: NDArray[np.int64], label: NDArray[np.float64], other: NDArray[np.float64], suggested: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the score of each label [N], and whether it is suspect.

    `label` is the mean probability of the label, `other` that of the most probable other class, `suggested`.
    """
    count = int(max(labels.max(), suggested.max())) + 1
    images = np.bincount(labels, minlength=count)
    threshold = np.bincount(labels, label, minlength=count) / np.maximum(images, 1)
    threshold[images == 0] = np.inf  # nothing is known of a class without images
    return (1 + label - other) / 2, (other > label) & (other >= threshold[suggested])


def find_suspects(
    path: str | Path,
    overrides: Sequence[str] = (),
    trust: Collection[str] = (),
    *,
    teachers: Sequence[str] = (),
    top: int | None = None,
    csv: Path | None = None,
    sheet: Path | None = None,
) -> Suspects:
    """Rank the labels of a cache that its teachers contradict; `top` limits the rows.

    `teachers` are asked, by default all that have logits. `csv` gets all suspects, `sheet` an HTML page with the images
    of the first ones, as the teacher saw them in view 0. `overrides` such as dataset.root=DIR locate the images.
    Raises RecipeError for images of any number of classes, for mixed ones, and if there are no labels.
    """
    cache = _opened(path, teachers)
    names = class_names(cache)
    index = np.flatnonzero(cache.labels >= 0)
    found = _measured(cache, index)
    labels = cache.labels[index].astype(np.int64)
    score, suspect = rank(labels, found.label, found.other, found.suggested)
    order = np.flatnonzero(suspect)[np.argsort(score[suspect], kind="stable")]
    views = _views(cache, overrides, trust, sheet is not None)
    rows = [
        {
            "index": int(index[n]),
            "id": None if views is None else views.dataset.ids[int(index[n])],
            "label": names[labels[n]],
            "suggested": names[found.suggested[n]],
            "score": float(score[n]),
            "p_label": float(found.label[n]),
            "p_suggested": float(found.other[n]),
            "contradicted": float(found.contradicted[n]),
        }
        for n in order
    ]
    if csv is not None:
        write_atomically(csv, as_csv(rows).encode(errors="surrogateescape"))
    if sheet is not None and views is not None:
        _write_sheet(sheet, cache, views, rows[:_SHEET], len(index))
    return Suspects(
        cache=cache.location,
        teachers=tuple(cache.manifest.teachers),
        labelled=len(index),
        views=cache.num_views,
        suspects=len(rows),
        rows=tuple(rows[:top]),
        csv=None if csv is None else str(csv),
        sheet=None if sheet is None else str(sheet),
    )


def _opened(path: str | Path, teachers: Sequence[str]) -> Cache:
    cache = only_logits(open_uncompared(path))
    if teachers:
        cache = cache.only({name: ["logits"] for name in teachers})
    counts = {entry.num_classes for entry in cache.manifest.teachers.values()}
    if is_multi_label(cache.labels) or cache.manifest.views.answered().mixing:
        what = "images of any number of classes" if is_multi_label(cache.labels) else "mixed images"
        raise RecipeError(
            f"{path} has {what}, of which no one class is right. Fix: a cache of images of one class each"
        )
    if len(counts) != 1 or not (cache.labels >= 0).any() or cache.labels.max() >= max(counts):  # type: ignore[type-var]
        raise RecipeError(
            f"{path}: labels are compared with the answers of teachers of the same classes; its images have "
            f"{cache.manifest.fingerprint.num_classes} classes, its teachers "
            f"{ {name: entry.num_classes for name, entry in cache.manifest.teachers.items()} }. "
            "Fix: --teacher NAME, one of the images' classes"
        )
    return cache


def _measured(cache: Cache, index: NDArray[np.int64]) -> _Columns:
    """Read the answers to all views; return the columns of some images."""
    reader, layout = ShardReader(cache.snapshot), cache.layout
    parts = []
    for number in track(range(layout.shards_per_view), "read answers", layout.shards_per_view, "shards"):
        shards = [layout.shard(view, number) for view in range(cache.num_views)]
        parts.append(_of_shards(reader, shards, cache.labels))
    return _Columns(*(np.concatenate(column)[index] for column in zip(*parts, strict=True)))


def _of_shards(reader: ShardReader, shards: Sequence[Shard], labels: Labels) -> _Columns:
    """Return the columns of the rows that the shards of all views have in common."""
    start, stop = shards[0].start, shards[0].stop
    own = torch.from_numpy(labels[start:stop].astype(np.int64)).clamp(min=0)
    total = contradicting = torch.zeros(0)
    num_answers = 0
    for shard in shards:
        count = max(1, NUMBERS // max(entry.num_classes or 1 for entry in reader.snapshot.manifest.teachers.values()))
        for first, answers in reader.batches(shard, count):
            for targets in answers.values():
                p = targets.log_probs().double().exp()
                if not len(total):
                    total, contradicting = torch.zeros(stop - start, p.shape[1]).double(), torch.zeros(stop - start)
                some = slice(first - start, first - start + len(p))
                total[some] += p
                contradicting[some] += (p.argmax(dim=1) != own[some]).float()
        num_answers += len(reader.snapshot.manifest.teachers)
    mean = total / num_answers
    label = mean.gather(1, own[:, None])[:, 0]
    other, suggested = mean.scatter(1, own[:, None], -1.0).max(dim=1)
    return _Columns(label.numpy(), other.numpy(), suggested.numpy(), (contradicting / num_answers).numpy())


def _views(cache: Cache, overrides: Sequence[str], trust: Collection[str], needed: bool) -> Views | None:
    """Open the images, for their ids and pixels; None if they are missing and optional."""
    try:
        return views_as_seen(cache, overrides, trust)
    except (DataError, RecipeError) as error:
        if needed or overrides:
            raise
        logger.info(f"images are named by their index alone: {error}")
        return None


def _write_sheet(sheet: Path, cache: Cache, views: Views, rows: Sequence[Mapping[str, Any]], labelled: int) -> None:
    figures = []
    for row in track(rows, "draw the contact sheet", len(rows)):
        pixels = views[ViewKey(0, row["index"])].numpy()
        caption = (
            f"label: {row['label']} ({100 * row['p_label']:.0f} %)\n"
            f"teachers: {row['suggested']} ({100 * row['p_suggested']:.0f} %)\n"
            f"score {row['score']:.3f}, {100 * row['contradicted']:.0f} % of answers against\n{row['id']}"
        )
        figures.append(picture(pixels, title=f"image {row['index']}", caption=caption))
    teachers = ", ".join(cache.manifest.teachers)
    lead = (
        f"{len(rows)} of {labelled} labels of {cache.location} that its teachers ({teachers}) contradict over "
        f"{cache.num_views} views, the most doubtful first. A ranking, no proof: look at each."
    )
    write_page(sheet, "Suspect labels", lead, [Section("Images", "As the teacher saw them in view 0.", figures)])
