"""Where the labels of a cache lie: one array of one uncompressed chunk, whose file is its values."""

import math
from typing import Any, NamedTuple

import numpy as np

from logitcache.views.datasets.base import UNLABELLED, Fingerprint, Labels, label_dtype


class LabelFile(NamedTuple):
    """The key of the labels, with their shape, [N] or [N, C], and type."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def label_file(recorded: Fingerprint) -> LabelFile:
    """Return where the labels of the images of a fingerprint lie."""
    classes = (recorded.num_classes or 0,) if recorded.multi_label else ()
    shape = (recorded.num_images, *classes)
    return LabelFile(label_key(len(shape)), shape, label_dtype(len(shape)))


def labels_of(data: bytes, recorded: Fingerprint) -> Labels:
    """Return the labels that bytes hold; raise ValueError for one that images of a fingerprint cannot have."""
    file = label_file(recorded)
    labels: Labels = np.frombuffer(data, file.dtype).reshape(file.shape)
    stop = 2 if recorded.multi_label else recorded.num_classes or 0
    if labels.size and (labels.min() < UNLABELLED or labels.max() >= stop):
        row = int(((labels < UNLABELLED) | (labels >= stop)).reshape(len(labels), -1).any(axis=1).argmax())
        kind = "a number of 1, 0 and -1 for each class" if recorded.multi_label else f"one of {stop} classes, or -1"
        raise ValueError(f"the label of image {row} is {labels[row].tolist()}, not {kind}")
    return labels


def label_key(ndim: int) -> str:
    """Return the key of labels of so many axes."""
    return f"label/c{'/0' * ndim}"
