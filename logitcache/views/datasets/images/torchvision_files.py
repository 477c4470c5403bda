"""Torchvision files: readers of our own for the sets of torchvision that any manifest may name.

Torchvision unpickles the files of CIFAR, and old forms of MNIST's. These readers run nothing that a file holds, and no
file makes them read more than _LARGEST bytes. They return the pixels and labels of torchvision's classes.
"""

import hashlib
import io
import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from logitcache.errors import DataError
from logitcache.store.safe_files import open_regular

_MNIST = ("MNIST", "FashionMNIST", "KMNIST")  # four files of plain numbers (idx)
_CIFAR = ("CIFAR10", "CIFAR100")  # pickles of known MD5: read by an unpickler that makes arrays alone
NAMES = (*_MNIST, *_CIFAR)
OPTIONS = ("train",)
"""The sets and the options of them that a manifest may name."""

_LARGEST = 1 << 28  # bytes; the largest file of these has 155 million


class StoredImages:
    """A map-style set of images in memory, uint8 [n, H, W] or [n, H, W, 3], with the class of each."""

    def __init__(self, images: NDArray[np.uint8], labels: Sequence[int], classes: Sequence[str]) -> None:
        if len(images) != len(labels):
            raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
        self.classes = list(classes)
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class."""
        return Image.fromarray(self._images[index]), int(self._labels[index])


def files_of(name: str, train: bool) -> tuple[str, ...]:
    """Name the files of a split of a set, below its root."""
    if name in _MNIST:
        part = "train" if train else "t10k"
        return f"{name}/raw/{part}-images-idx3-ubyte", f"{name}/raw/{part}-labels-idx1-ubyte"
    return tuple(_cifar_files(_class_named(name), train))


def read_split(name: str, root: Path, train: bool) -> StoredImages:
    """Read a split of a set below a root. Raises DataError for files that are missing, or other than torchvision's."""
    made = _class_named(name)
    try:
        return _mnist(made, root, train) if name in _MNIST else _cifar(made, root, train)
    except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError, EOFError, IndexError) as cause:
        if isinstance(cause, DataError):
            raise
        reason = str(cause) or type(cause).__name__
        if isinstance(cause, OSError) and cause.filename:
            reason = f"{cause.filename}: {cause.strerror}"
        raise DataError(
            f"{name} cannot be opened in '{root}': {reason}.\n"
            "  Fix: correct root, or set download: true if torchvision can fetch it."
        ) from cause


def _class_named(name: str) -> Any:
    from torchvision import datasets  # imports torch's compiler, for seconds

    return getattr(datasets, name)


def _bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"{path} has more than {_LARGEST} bytes")
    return data


def _mnist(made: Any, root: Path, train: bool) -> StoredImages:
    images, labels = (_idx(root / name) for name in files_of(made.__name__, train))
    if images.ndim != 3 or labels.ndim != 1:
        raise ValueError(f"it has images {list(images.shape)} and labels {list(labels.shape)}")
    return StoredImages(images, labels.tolist(), made.classes)


def _idx(path: Path) -> NDArray[np.uint8]:
    """Parse an idx file of bytes: 0, 0, 8, the number of axes, their lengths as big-endian int32, the numbers."""
    data = _bytes(path)
    if data[:3] != b"\0\0\x08" or len(data) < 4 or not 1 <= data[3] <= 3:
        raise ValueError(f"{path} is no idx file of bytes")
    axes = struct.unpack_from(f">{data[3]}I", data, 4)
    start = 4 + 4 * data[3]
    if math.prod(axes) != len(data) - start:
        raise ValueError(f"{path} states {list(axes)} numbers, and has {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(axes)


def _cifar_files(made: Any, train: bool) -> Mapping[str, str]:
    """Return the MD5 of each file, the one with the names of the classes last."""
    files = dict(made.train_list if train else made.test_list) | {made.meta["filename"]: made.meta["md5"]}
    return {f"{made.base_folder}/{name}": md5 for name, md5 in files.items()}


def _cifar(made: Any, root: Path, train: bool) -> StoredImages:
    *batches, meta = (_unpickled(root / name, md5) for name, md5 in _cifar_files(made, train).items())
    images = np.concatenate([np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches])
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    return StoredImages(images.transpose(0, 2, 3, 1), labels, meta[made.meta["key"]])


def _unpickled(path: Path, md5: str) -> dict[str, Any]:
    """Read a pickle of a known MD5; the very bytes that were compared are parsed, and make arrays and texts alone."""
    data = _bytes(path)
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is not the file that torchvision knows (its MD5 differs)")
    found: dict[str, Any] = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    return found


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows no function but those of which numpy's arrays are made."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array of numbers")
        return known[module, name]
