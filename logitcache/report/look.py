"""Look at one view of an image of a cache: the pixels that the teacher saw, and its answers to all views of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_uncompared
from logitcache.errors import RecipeError, did_you_mean
from logitcache.report.answers import class_names, label_names, probabilities
from logitcache.report.figures.picture import as_image, picture
from logitcache.report.images import views_as_seen
from logitcache.report.page.page import Section, Table, write_page
from logitcache.student.evaluation.validation import only_logits
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

MOST_VIEWS = 24
"""Views of the image that the page shows."""


@dataclass(frozen=True)
class Look:
    """A view of an image, and its teachers' answers.

    `labels` are the names (else the numbers) of the image's classes as the teacher saw them. `classes`: a row for each
    of the most probable classes of a teacher, by the mean of its probabilities over the views. `views`: a row for each
    view and teacher with its most probable classes.
    """

    cache: str
    view: int
    index: int
    id: str
    labels: tuple[str, ...]
    mixed_with: str | None
    classes: tuple[dict[str, Any], ...]
    views: tuple[dict[str, Any], ...]
    out: str


def look(
    path: str | Path,
    key: str,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    trust: Collection[str] = (),
    top: int = 5,
) -> Look:
    """Write a view as PNG (its pixels), or as an HTML page with the teachers' answers over all views, by `out`'s name.

    `key` is VIEW/INDEX or VIEW/ID. `overrides` such as dataset.root=DIR locate the images. Raises RecipeError for a key
    that is not there, and as `Cache.views` if the images are not those of the cache.
    """
    cache = only_logits(open_uncompared(path))
    views = views_as_seen(cache, overrides, trust)
    chosen = _parsed(key, cache, views.dataset)
    file = out or Path(f"view-{chosen.view}-{chosen.index}.html")
    if file.suffix.lower() not in (".png", ".html"):
        raise RecipeError(f"--out {file}: a view is written as .png or .html. Fix: --out {file.with_suffix('.html')}")
    keys = [ViewKey(view, chosen.index) for view in range(cache.num_views)]
    answers = {name: probabilities(cache, targets) for name, targets in cache.answers(keys).items()}
    names = class_names(cache)
    found = Look(
        cache=cache.location,
        view=chosen.view,
        index=chosen.index,
        id=views.dataset.ids[chosen.index],
        labels=label_names(cache, chosen),
        mixed_with=_partner(views, chosen),
        classes=tuple(row for name, rows in answers.items() for row in _over_views(name, rows, names, top)),
        views=tuple(
            {"view": view, "teacher": name, "classes": ", ".join(scores(row, names, top))}
            for name, rows in answers.items()
            for view, row in enumerate(rows)
        ),
        out=str(file),
    )
    if file.suffix.lower() == ".png":
        as_image(views[chosen].numpy()).save(file, "PNG")
    else:
        _write(found, views, file)
    return found


def _parsed(text: str, cache: Cache, images: ImageDataset) -> ViewKey:
    """Parse VIEW/INDEX or VIEW/ID. Raises RecipeError."""
    view, _, image = text.partition("/")
    if not view.isdecimal() or int(view) >= cache.num_views or not image:
        raise RecipeError(
            f"--view {text}: {cache.location} has the views 0 to {cache.num_views - 1}. Fix: VIEW/INDEX or VIEW/ID, as "
            f"in --view 0/{images.ids[0]}"
        )
    if (index := index_of(image, images.ids)) is not None:
        return ViewKey(int(view), index)
    raise RecipeError(f"--view {text}: {cache.location} has {unknown_image(image, images.ids)}")


def index_of(image: str, ids: Sequence[str]) -> int | None:
    """Return the index of an image that its id or its index names; None if there is none."""
    if image in ids:
        return ids.index(image)
    return int(image) if image.isdecimal() and int(image) < len(ids) else None


def unknown_image(image: str, ids: Sequence[str]) -> str:
    """Describe an image that is not there, and what would be."""
    near = did_you_mean(image, ids)
    return f"no image {image!r}.{near} Fix: an index from 0 to {len(ids) - 1}, or an id such as {ids[0]!r}"


def _partner(views: Views, key: ViewKey) -> str | None:
    """Return the id of the image that a view is mixed with; None if it is not mixed."""
    return views.dataset.ids[views.partners([key])[0].index] if views.spec.mixing else None


def _best(row: NDArray[np.float32], top: int) -> list[int]:
    return [int(c) for c in np.argsort(-row, kind="stable")[:top]]


def scores(row: NDArray[np.float32], names: Sequence[str], top: int) -> list[str]:
    """Return the most probable classes of a row [C] as text, best first."""
    return [f"{names[c]} {100 * row[c]:.1f} %" for c in _best(row, top)]


def _over_views(teacher: str, rows: NDArray[np.float32], names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Return the classes of the highest mean probability over views [V, C], and in how many views each is the first."""
    mean, first = rows.mean(axis=0), rows.argmax(axis=1)
    return [
        {
            "teacher": teacher,
            "class": names[c],
            "probability": float(mean[c]),
            "first_in_views": int((first == c).sum()),
        }
        for c in _best(mean, top)
    ]


def _write(found: Look, views: Views, file: Path) -> None:
    """Write the page: the view, the other views of the image beside it, and the answers."""
    shown = list(dict.fromkeys([found.view, *range(views.spec.num_views)]))[:MOST_VIEWS]
    figures = []
    for view in shown:
        rows = [row for row in found.views if row["view"] == view]
        caption = "\n".join(f"{row['teacher']}: {row['classes'].replace(', ', chr(10))}" for row in rows)
        pixels = views[ViewKey(view, found.index)].numpy()
        side = 300 if view == found.view else 150
        figures.append(picture(pixels, rows, title=f"view {view}", caption=caption, side=side))
    label = ", ".join(found.labels) or "none"
    mixed = "" if found.mixed_with is None else f" Mixed with {found.mixed_with} in this view."
    sections = [
        Section("Views", "What the teacher saw, and its most probable classes.", figures),
        Section(
            "Over all views",
            tables=[Table("mean probability over views", found.classes), Table("by view", found.views)],
        ),
    ]
    lead = f"Image {found.index} ({found.id}) of {found.cache}. Label: {label}.{mixed}"
    write_page(file, f"View {found.view} of image {found.index}", lead, sections)
