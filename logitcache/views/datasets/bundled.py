"""Bundled: a part of Fashion-MNIST that comes with the package."""

import functools
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from logitcache.errors import DataError
from logitcache.runtime.shipped_files import shipped_folder
from logitcache.views.datasets.base import DatasetBase, pixel_digest
from logitcache.views.datasets.images.ids import PackedIds

_CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_NUM_IMAGES = {"train": 5000, "test": 2000}


class Bundled(DatasetBase):
    """5,000 training or 2,000 test images of Fashion-MNIST, grey, 28 × 28, ten classes, shipped with the package."""

    kind: Literal["bundled"] = "bundled"
    split: Literal["train", "test"] = Field(default="train", description="Images to open.")
    num_images: Annotated[int, Field(ge=10, multiple_of=10)] | None = Field(
        default=None,
        description="Number of images, a multiple of 10: the first of each class, in order. By default all.",
        examples=[200],
    )

    @model_validator(mode="after")
    def _enough_images(self) -> "Bundled":
        held = _NUM_IMAGES[self.split]
        if self.num_images is not None and self.num_images > held:
            raise ValueError(f"num_images is {self.num_images}, split '{self.split}' has {held}")
        return self

    def open(self) -> "BundledImages":
        """Load the images; raises DataError when the package's data are not there."""
        path = shipped_folder("data") / "fashion_mnist" / f"{self.split}.npz"
        if not path.is_file():
            raise DataError(f"the bundled images '{path}' are missing.\n  Fix: install logitcache again.")
        images, labels, index = _stored(path)
        share = (self.num_images or len(labels)) // len(_CLASS_NAMES)
        first = [np.flatnonzero(labels == label)[:share] for label in range(len(_CLASS_NAMES))]
        rows = np.sort(np.concatenate(first))
        return BundledImages(self.split, images[rows], labels[rows], index[rows])


@functools.cache
def _stored(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
    """Return images, labels and places of a file, which is read once a process."""
    with np.load(path) as stored:
        return stored["images"], stored["labels"], stored["index"]


class BundledImages:
    """Fashion-MNIST in memory; an id is the place in the original file."""

    num_classes = len(_CLASS_NAMES)
    class_names = _CLASS_NAMES

    def __init__(
        self,
        split: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        index: NDArray[np.int32],
    ) -> None:
        self.ids = PackedIds(f"{split}/{place:05d}" for place in index)
        self.labels = labels.astype(np.int64)
        self._images = images

    def read(self, index: int) -> Tensor:
        """Return uint8 [1, 28, 28]."""
        return torch.from_numpy(self._images[index][None].copy())

    def sizes(self) -> NDArray[np.int64]:
        """Return the heights and widths [n, 2]."""
        return np.tile(np.array(self._images.shape[1:], np.int64), (len(self.ids), 1))

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all images [n]."""
        return np.fromiter((pixel_digest(self.read(index)) for index in range(len(self.ids))), np.uint64)
