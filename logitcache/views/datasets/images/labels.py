"""Labels: one class an image, or a yes or no to every class."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import DataError, did_you_mean
from logitcache.views.datasets.base import UNLABELLED, Labels, is_multi_label

SHOWN = 20
"""Classes that a message lists."""

_LONGEST_LABEL = 1 << 20
_SHAPES = "a label is one whole number, -1 or None; or, of any number of classes, a vector with 1 or 0 for each class"


def as_label(label: object) -> Labels:
    """Return the label of an item, int64 [] or int8 [C]; -1 for what is unknown.

    Raises ValueError for what is neither a whole number nor a vector of 1, 0 and -1 for two classes or more.
    """
    if label is None:
        return np.array(UNLABELLED)
    value = np.asarray(label)
    if value.ndim == 1:
        return _multi_hot(value)
    if value.ndim != 0 or value.dtype.kind not in "iu":
        raise ValueError(f"{_SHAPES}, not {label!r} ({type(label).__name__}). Return the index of the class")
    if int(value) < UNLABELLED:
        raise ValueError(f"a label is -1 (none), 0 or more, not {int(value)}")
    return value.astype(np.int64)


def _multi_hot(value: NDArray[np.generic]) -> Labels:
    if value.dtype.kind not in "biuf" or not np.isin(value, (0, 1, UNLABELLED)).all():
        raise ValueError(f"{_SHAPES} and -1 if that is unknown, not {_shown(value)}")
    if len(value) < 2:
        raise ValueError(
            f"a label of any number of classes has a number for each of two or more, not {_shown(value)}. "
            "Return a class as one whole number"
        )
    return value.astype(np.int8)


def _shown(value: NDArray[np.generic]) -> str:
    return np.array2string(value, threshold=8, separator=", ")


def label_of_text(text: bytes) -> Labels:
    """Return the label that a text states: a whole number, or a list in JSON; raises ValueError for another."""
    if len(text) > _LONGEST_LABEL:
        raise ValueError(f"its text has {len(text)} bytes, more than {_LONGEST_LABEL}")
    try:
        label = int(text)
    except ValueError:
        try:
            label = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"its text is {text[:40]!r}, neither a whole number nor a list of them") from None
    return as_label(label)


class LabelTable:
    """The labels of a data set as they come in, image by image; the first that is there decides of which sort."""

    def __init__(self, num_images: int) -> None:
        self.values: Labels = np.full(num_images, UNLABELLED, np.int64)
        self._begun = False

    def put(self, index: int, label: Labels) -> None:
        """Keep the label of an image; raises ValueError for one of another sort than those before."""
        if label.ndim == 0 and label == UNLABELLED:
            return
        if not self._begun and label.ndim:
            self.values = np.full((len(self.values), len(label)), UNLABELLED, np.int8)
        self._begun = True
        if label.shape != self.values.shape[1:]:
            raise ValueError(f"its label is {_sort(label.shape)}, those before it are {_sort(self.values.shape[1:])}")
        self.values[index] = label


def _sort(shape: tuple[int, ...]) -> str:
    return f"of {shape[0]} classes, each 1 or 0" if shape else "one whole number"


def num_classes_of(labels: Labels, stated: int | None, ids: Sequence[str], name: str) -> int | None:
    """Return what is stated, else one more than the largest label; of multi-hot labels their length.

    Without a label it is None. Raises DataError for labels that are not of as many classes as is stated.
    """
    if is_multi_label(labels):
        columns: int = labels.shape[1]
        if stated not in (None, columns):
            raise DataError(
                f"labels of {name} are of {columns} classes, but there are {stated}.\n"
                "  Fix: one number for each class, or correct num_classes and classes."
            )
        return columns
    largest = int(labels.max())
    if largest == UNLABELLED:
        return None
    if stated is not None and largest >= stated:
        raise DataError(
            f"image '{ids[int(np.argmax(labels))]}' of {name} has label {largest}, but there are "
            f"{stated} classes.\n  Fix: count classes from 0, or correct num_classes."
        )
    return stated or largest + 1


def class_counts(labels: Labels, num_classes: int) -> NDArray[np.int64]:
    """Return how many images are known to be of each class, [C]."""
    if is_multi_label(labels):
        return np.asarray((labels == 1).sum(axis=0))
    return np.bincount(labels[labels >= 0], minlength=num_classes)


def single_labels(labels: Tensor) -> Tensor:
    """Return the one class of each image of a batch, int64 [B]; of multi-hot labels [B, C] -1, as none is the one."""
    return labels if labels.ndim == 1 else labels.new_full((len(labels),), UNLABELLED).long()


def class_index(key: str, names: Sequence[str], count: int) -> int:
    """Return the class of `count` that a key names or, if none has that name, numbers.

    Raises ValueError, with the nearest name, if there is none.
    """
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < count:
        return int(key)
    raise ValueError(f"the images have no class {key!r}.{did_you_mean(key, names)}")


def listed_classes(names: Sequence[str], count: int) -> str:
    """List the first classes for a message."""
    known = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "") if names else "without names"
    return f"{count} classes ({known})"
