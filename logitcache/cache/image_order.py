"""The order of a cache's images: ids decide which image of a data set is which row, wherever the data set puts it.

A cache keeps the order of the images that it began with, and appends new ones in the order of the data set. It keeps
their ids once it has grown; before that its images are found by their content.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from logitcache.cache.format.growth import GROWING_IDS, read_growth
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.manifest_diff import is_more
from logitcache.cache.format.root import read_manifest
from logitcache.cache.format.samples import fingerprint_of_first, packed_ids, read_digests, read_ids, read_sized
from logitcache.cache.snapshot import Snapshot
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError
from logitcache.runtime.console import logger
from logitcache.store.base import Store
from logitcache.views.datasets.arranged import ABSENT, ArrangedImages
from logitcache.views.datasets.base import UNLABELLED, ImageDataset, Labels, is_multi_label, names_digest
from logitcache.views.datasets.fingerprint_diff import names_of
from logitcache.views.keys import Ints

Without = Annotated[
    Literal["missing"] | tuple[str, ...],
    Field(
        description="Images of the cache to leave out because the data set no longer has them: `missing` for all "
        "missing images, or a list of ids, besides which none may be missing. Only works with a cache to which images "
        "were appended, as others do not record the ids of their images.",
        examples=["missing", ["cat/07.jpg"]],
    ),
]
"""Images of a cache that a student leaves out: all that the data set lacks, or those with some ids."""

_MOST_TRIED = 1024
"""Choices among copies of one image that are tried to find the images that a cache began with."""


def in_cache_order(store: Store, manifest: Manifest, dataset: ImageDataset, ids: Sequence[str]) -> ArrangedImages:
    """Return the images with some ids, in their order, with the labels that the classes of the cache have.

    Images that the data set lacks are ABSENT. Raises MismatchError for images of other classes.
    """
    place_of = {name: place for place, name in enumerate(dataset.ids)}
    rows = np.array([place_of.get(name, ABSENT) for name in ids], np.int64)
    names, recorded = dataset.class_names, manifest.fingerprint
    if manifest.class_names is not None and names is not None:
        names = manifest.class_names
    labels = _labels(store, manifest, dataset, rows)
    return ArrangedImages(dataset, rows, manifest.first.num_images, ids, labels, recorded.num_classes, names)


def _labels(store: Store, manifest: Manifest, dataset: ImageDataset, rows: Ints) -> Labels:
    """Return the labels of rows as the cache numbers the classes; raise MismatchError for a class that it lacks."""
    recorded, names = manifest.fingerprint, dataset.class_names
    labels: Labels = dataset.labels.copy()
    digest = None if names is None else names_digest(names)
    if is_multi_label(labels) != recorded.multi_label:
        raise MismatchError(f"{store}: the data set has labels of another kind than the cache. Fix: the same labels")
    if digest != recorded.class_names and not is_multi_label(labels) and names and manifest.class_names:
        numbers = {name: number for number, name in enumerate(manifest.class_names)}
        of_class = np.array([*(numbers.get(name, recorded.num_classes) for name in names), -1], np.int64)
        labels = of_class[labels]
    elif digest != recorded.class_names:
        raise MismatchError(
            f"{store}: the classes of the data set are not those of the cache, whose names are not known. Fix: the "
            "same classes, or precompute a new cache"
        )
    found = np.where((rows == ABSENT).reshape(-1, *[1] * (labels.ndim - 1)), UNLABELLED, labels[rows])
    count = recorded.num_classes or 0
    new = rows[(found >= count) & (rows != ABSENT)] if not is_multi_label(labels) else rows[:0]
    if is_multi_label(labels) and labels.shape[1] != count:
        raise MismatchError(
            f"{store}: labels of {labels.shape[1]} classes, the cache has {count}. Fix: the same classes"
        )
    if len(new):
        raise MismatchError(
            f"{store}: {len(new)} new images are of classes that the cache does not have: {names_of(dataset, new)}. "
            "Its teachers and its students answer for fixed classes, whose numbers never change.\n"
            "  Fix: move these images out of the data set, or precompute a new cache with all classes"
        )
    return found.astype(labels.dtype)


def recorded_ids(store: Store, manifest: Manifest, dataset: ImageDataset) -> list[str]:
    """Read the ids of the images of a cache that grew; if they are damaged, find the images by their content."""
    try:
        return read_ids(store, manifest, manifest.fingerprint.ids)
    except CacheError:
        old, new = read_digests(store, manifest, manifest.fingerprint.content), dataset.digests()
        there = np.flatnonzero(np.isin(new, old))
        if len(there) != len(old):
            raise
        order = np.empty(len(old), np.int64)
        order[np.argsort(old, kind="stable")] = there[np.argsort(new[there], kind="stable")]
        ids = [dataset.ids[place] for place in order.tolist()]
        if names_digest(ids) != manifest.fingerprint.ids:
            raise
        return ids


def first_ids(store: Store, manifest: Manifest, dataset: ImageDataset) -> list[str] | None:
    """Return the ids of the images of a cache that never grew, found by their content; None if they are not all there.

    If the data set has more copies of an image than the cache, the digest of all ids decides which are meant.
    """
    old, new = read_digests(store, manifest), dataset.digests()
    wanted, there = Counter(old.tolist()), Counter(new.tolist())
    if any(there[word] < count for word, count in wanted.items()):
        return None
    kept = np.isin(new, old)
    copies = {word: np.flatnonzero(new == word) for word, count in wanted.items() if there[word] > count}
    choices = itertools.product(
        *(itertools.combinations(places.tolist(), len(places) - wanted[word]) for word, places in copies.items())
    )
    for left_out in itertools.islice(choices, _MOST_TRIED):
        chosen = kept.copy()
        chosen[[place for places in left_out for place in places]] = False
        ids = [dataset.ids[place] for place in np.flatnonzero(chosen).tolist()]
        if np.array_equal(new[chosen], old) and names_digest(ids) == manifest.fingerprint.ids:
            return ids
    return None


def images_of(store: Store, manifest: Manifest, dataset: ImageDataset, without: Without = ()) -> ImageDataset:
    """Return the images of a cache in its order, if images were appended to it; images that it lacks are left out.

    Of the cache's own images those of `without` are absent: those with these ids, or all that are missing. Raises
    MismatchError naming others that the data set lacks.
    """
    if isinstance(dataset, ArrangedImages):
        return dataset
    if manifest.appended is None and without:
        raise RecipeError(
            f"without: {store} keeps no ids of its images, as none were appended to it. Fix: put the missing images "
            "back, or precompute a new cache of those that are left"
        )
    if manifest.appended is None:
        return dataset
    images = in_cache_order(store, manifest, dataset, read_ids(store, manifest, manifest.fingerprint.ids))
    if isinstance(without, str):
        images = images.without(images.absent)
    elif without:
        place_of = {name: place for place, name in enumerate(images.ids)}
        if unknown := [name for name in without if name not in place_of]:
            raise RecipeError(f"without: {store} has no image {unknown[0]!r}. Fix: ids of its images")
        gone = np.array([place_of[name] for name in without], np.int64)
        _require_present(store, images, np.setdiff1d(images.absent, gone))
        images = images.without(gone)
    else:
        _require_present(store, images, images.absent)
    if images.num_left_out:
        logger.info(f"{images.num_left_out} images of the data set are not in {store}: they are left out")
    return images


def _require_present(store: Store, images: ArrangedImages, absent: Ints) -> None:
    if len(absent):
        raise MismatchError(
            f"{store}: {len(absent)} of its {len(images.rows)} images are missing from the data set: "
            f"{names_of(images, absent)}.\n  Fix: put them back; a student leaves them out by `without: missing`"
        )


def images_to_answer(store: Store, dataset: ImageDataset, *, appends: bool) -> ImageDataset:
    """Return the images of a cache in its order, with those that it is to be grown by if new ones are appended.

    A growth that was begun is finished first, and so is a cache that is not complete: further images wait. Raises
    MismatchError for missing images, and for new ones unless they are appended.
    """
    manifest = read_manifest(store)
    if not appends and manifest.appended is None:
        return dataset
    goal, recorded = read_growth(store, manifest), manifest
    is_growing = goal.num_images > manifest.num_images
    if appends and is_growing and goal.appended is not None:
        data = read_sized(store, GROWING_IDS, goal.appended.id_bytes, goal.fingerprint.ids)
        manifest, ids = goal, data.decode(errors="surrogateescape").split("\n")
    else:
        known = recorded_ids(store, manifest, dataset) if manifest.appended else first_ids(store, manifest, dataset)
        if known is None:
            return dataset  # which is refused as other images
        ids = known
    there = set(ids)
    new = [place for place, name in enumerate(dataset.ids) if name not in there]
    if new and not appends:
        raise MismatchError(
            f"{store}: {len(new)} images of the data set are new: {names_of(dataset, new)}.\n"
            "  Fix: new_images: append in the recipe, which appends them to the cache; or move them away"
        )
    is_settled = bool(new) and not is_more(goal, recorded) and Snapshot.as_described(store, recorded).complete
    added = _whole(manifest, new, store) if is_settled else []
    images = in_cache_order(store, manifest, dataset, [*ids, *(dataset.ids[place] for place in added)])
    _require_present(store, images, images.absent)
    if new and not is_settled:
        logger.info(f"{len(new)} new images wait: what {store} is made of now is finished first. Run this again after")
    elif added:
        logger.info(f"{len(added)} new images are appended to {store}: {names_of(dataset, added)}")
    if broken := [name for name in images.ids if "\n" in name]:
        raise DataError(f"the id of an image holds a line break: {broken[0]!r}.\n  Fix: rename it.")
    return images


def _whole(manifest: Manifest, new: Sequence[int], store: Store) -> Sequence[int]:
    """Return the new images that can be appended: of mixed views those that fill whole windows of partners."""
    window = manifest.views.pairing_window
    if not new or not manifest.views.mixing:
        return new
    if window is None:
        raise MismatchError(
            f"{store} mixes each image with any other, which new images would change.\n"
            "  Fix: precompute a new cache with views.pairing_window, which grows by whole windows"
        )
    if len(new) % window:
        logger.info(f"{len(new) % window} new images fill no window of {window} partners, and wait for more")
    return new[: len(new) // window * window]


def first_images(store: Store, manifest: Manifest, count: int) -> Manifest:
    """Return the manifest of a cache with its first `count` images, as many as it had once.

    Their fingerprint follows from what is kept of each image. Raises MismatchError for a number that it never had.
    """
    appended, recorded = manifest.appended, manifest.fingerprint
    if count == manifest.num_images:
        return manifest
    if appended is None or not appended.first.num_images <= count <= manifest.num_images:
        least = manifest.first.num_images
        raise MismatchError(f"{store} has {manifest.num_images} images and began with {least}, not {count}")
    prefix = appended.first if count == appended.first.num_images else fingerprint_of_first(store, manifest, count)
    ids = packed_ids(read_ids(store, manifest, recorded.ids)[:count])
    update = {
        "fingerprint": prefix,
        "appended": appended.model_copy(update={"id_bytes": len(ids)}),
        "canaries": tuple(canary for canary in manifest.canaries if canary.index < count),
    }
    return manifest.model_copy(update=update)
