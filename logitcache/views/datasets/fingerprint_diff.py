"""Fingerprint differences: how a data set differs from the one of a recorded fingerprint."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logitcache.views.datasets.base import Fingerprint, ImageDataset, fingerprint, names_digest

_SHOWN = 3
_WORDS = {
    "num_images": "number of images",
    "num_classes": "number of classes",
    "class_names": "names of the classes",
    "ids": "ids and their order",
    "labels": "labels",
    "sizes": "sizes of the images",
    "content": "content of the images",
}
"""How a message names the fields of a fingerprint."""
_FORMS: tuple[Literal["NFC"], Literal["NFD"]] = ("NFC", "NFD")
_FIX_OF_FORM = (
    "rename files and folders to {form}, as `convmv -f utf8 -t utf8 --{option} -r --notest DIR` does, or copy the "
    "images again with a tool that keeps names as they are; macOS and some tools of copying write accented letters in "
    "another form."
)


def explain_difference(
    recorded: Fingerprint,
    recorded_digests: NDArray[np.uint64] | None,
    dataset: ImageDataset,
) -> str:
    """List what differs, with the values of both sides, and the fix; "" if nothing does.

    With the recorded digests [n] the images that changed, came or went are named.
    """
    here = fingerprint(dataset)
    values = {words: (getattr(recorded, name), getattr(here, name)) for name, words in _WORDS.items()}
    differing = {words: pair for words, pair in values.items() if pair[0] != pair[1]}
    lines = [f"  {words}: recorded {_value(then)}, here {_value(now)}" for words, (then, now) in differing.items()]
    if not lines:
        return ""
    if recorded_digests is not None and len(recorded_digests) != recorded.num_images:
        recorded_digests = None
    form = _other_form(recorded, here, recorded_digests, dataset)
    if form is not None:
        detail = [f"the same images under the same names in another Unicode form: recorded in {form}, here in another"]
        return _explained(lines, detail, _FIX_OF_FORM.format(form=form, option=form.lower()))
    detail = [] if recorded_digests is None else _images(recorded, here, recorded_digests, dataset)
    return _explained(lines, detail, _fix(recorded, here))


def _explained(lines: list[str], detail: list[str], fix: str) -> str:
    return "\n".join([*lines, *(f"  -> {line}" for line in detail), f"  Fix: {fix}"])


def _value(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else str(value)


def _images(then: Fingerprint, now: Fingerprint, old: NDArray[np.uint64], dataset: ImageDataset) -> list[str]:
    """Say which images changed, came, went, moved or were renamed."""
    new = dataset.digests()
    if then.content == now.content:
        renamed = then.ids != now.ids
        return ["the same images in the same order, under other names"] if renamed else []
    missing, added = _places(old, new), _places(new, old)
    if len(missing) == len(added) == 0:
        first = int(np.flatnonzero(old != new)[0])
        return [f"the same images in another order, from '{dataset.ids[first]}' (row {first}) on"]
    if then.ids == now.ids:
        changed = np.flatnonzero(old != new)
        return [f"{len(changed)} of {len(new)} images changed: {names_of(dataset, changed)}"]
    lines = []
    if len(added):
        lines.append(f"{len(added)} images are new or changed: {names_of(dataset, added)}")
    if len(missing):
        rows = ", ".join(str(row) for row in missing[:_SHOWN])
        more = ", …" if len(missing) > _SHOWN else ""
        lines.append(f"{len(missing)} recorded images are missing or changed: rows {rows}{more}")
    return lines


def _other_form(
    then: Fingerprint, now: Fingerprint, old: NDArray[np.uint64] | None, dataset: ImageDataset
) -> str | None:
    """Return the Unicode form in which the names here are those recorded; None if that is not all that differs.

    Names in another form sort in another order: with the recorded digests `old` images are found again by content.
    """
    if then.ids == now.ids or then.num_images != now.num_images:
        return None
    order = np.arange(now.num_images)
    if old is not None:
        new = dataset.digests()
        if not np.array_equal(np.sort(old), np.sort(new)):
            return None
        order[np.argsort(old, kind="stable")] = np.argsort(new, kind="stable")
    names = [dataset.ids[place] for place in order.tolist()]
    if names_digest(names) == then.ids:  # the names are the same, in another order
        return None
    digests = {form: names_digest([unicodedata.normalize(form, name) for name in names]) for form in _FORMS}
    return next((form for form in _FORMS if digests[form] == then.ids), None)


def _places(these: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return where `these` hold what `others` lack; copies of one image are counted."""
    left = Counter(others.tolist())
    extra = []
    for place, word in enumerate(these.tolist()):
        if left[word] == 0:
            extra.append(place)
        left[word] -= 1
    return np.array(extra, np.int64)


def names_of(dataset: ImageDataset, places: NDArray[np.int64] | Sequence[int]) -> str:
    """Name the first three images at some places of a data set, for a message."""
    shown = ", ".join(f"'{dataset.ids[int(place)]}'" for place in places[:_SHOWN])
    return shown + (", …" if len(places) > _SHOWN else "")


def _fix(then: Fingerprint, now: Fingerprint) -> str:
    if then == now.model_copy(update={"sizes": then.sizes}):
        return (
            "decode the files as then, with the recorded version of Pillow and the same `orientation`, or precompute a "
            "new cache."
        )
    if then.num_images == now.num_images and then.ids == now.ids:
        what = "the original files" if then.content != now.content else "the original labels and classes"
        return f"put back {what}, or precompute a new cache from the present ones."
    fix = "point the data set at the same images with the same names, or precompute a new cache from the present ones"
    if now.num_images > then.num_images:
        fix += "; `new_images: append` in the recipe of precompute appends new images"
    return f"{fix}."
