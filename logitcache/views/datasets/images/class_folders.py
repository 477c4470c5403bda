"""Class folders: order and labels of the images below a root, local or remote.

Order and classes are those of torchvision's ImageFolder, without hidden files and folders.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError
from logitcache.runtime.console import logger
from logitcache.views.datasets.base import UNLABELLED
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.datasets.images.image_files import extension_names, some

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")

Split = Literal["train", "validation"]


class Listing(NamedTuple):
    """Images in order: paths below a root, labels [n], and the names of the classes."""

    ids: PackedIds
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] | None


def unlabelled(root: str, files: PackedIds) -> Listing:
    """List images without labels; raises DataError for an empty root."""
    if not files:
        raise DataError(_why_no_images(root))
    return Listing(files, np.full(len(files), UNLABELLED, np.int64), None)


def by_class(
    root: str, loose: list[str], classes: list[str], images: Sequence[PackedIds], labelled: bool | None
) -> Listing:
    """List the images of each class; `loose` images lie in no class folder, which `labelled: true` does not allow.

    Raises DataError for an ambiguous layout, and for an empty class or root.
    """
    if loose and not any(images) and labelled:
        raise DataError(
            f"'{root}' has no class folders, so that its {len(loose)} images have no labels, and the data set is "
            "labelled: true.\n  Fix: correct root, or set labelled: false."
        )
    if loose and not any(images):
        logger.info(
            f"'{root}' has no class folders, so that its {len(loose)} images have no labels. Fix: correct root, or set "
            "labelled: false if that is meant"
        )
        return unlabelled(root, PackedIds(loose))
    if loose:
        raise DataError(
            f"'{root}' holds both class folders ('{classes[0]}') and images of no class "
            f"({some(loose)}).\n  Fix: move the images into class folders or away, or set "
            "labelled: false to take every image without a label."
        )
    _check_classes(root, classes, images)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in images])
    return Listing(PackedIds.joined(images), labels, tuple(classes))


def of_split(root: str, listing: Listing, split: Split | None, holdout: int) -> Listing:
    """Keep the images of a split: `validation` is every `holdout`-th image in order, `train` the others.

    All classes keep their numbers. Raises DataError if the split has no image.
    """
    if split is None:
        return listing
    held_out = np.arange(len(listing.ids)) % holdout == 0
    chosen = held_out if split == "validation" else ~held_out
    if not chosen.any():
        raise DataError(
            f"'{root}' holds {len(listing.ids)} image, which is that of split: validation.\n"
            "  Fix: add images, or leave out split."
        )
    return Listing(PackedIds(compress(listing.ids, chosen)), listing.labels[chosen], listing.class_names)


def _check_classes(root: str, classes: list[str], images: Sequence[PackedIds]) -> None:
    if not any(images):
        raise DataError(_why_no_images(root))
    empty = [name for name, files in zip(classes, images, strict=True) if not files]
    if empty:
        raise DataError(
            f"class folders without an image in '{root}': {some(empty)}.\n"
            f"  Fix: remove them, or add images ({extension_names()})."
        )
    if {name.lower() for name in classes} <= set(SPLITS):
        raise DataError(
            f"'{root}' holds splits ({some(classes)}), which would become the classes.\n"
            f"  Fix: set root: {root}/{classes[0]}, or labelled: false to take every image."
        )


def _why_no_images(root: str) -> str:
    return f"there are no images in '{root}'.\n  Fix: correct root, or add images ({extension_names()})."
