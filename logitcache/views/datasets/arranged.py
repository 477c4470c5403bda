"""Arranged images: some images of a data set, in the order in which a cache has them."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import DataError
from logitcache.views.datasets.base import ImageDataset, Labels, Turned, orientation_of, read_images
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.scaled_decoding import reduced

ABSENT = -1
"""Place of an image that the data set does not have."""


def present(dataset: ImageDataset) -> NDArray[np.int64]:
    """Return the places of the images of a data set that are there: all but absent ones in the order of a cache."""
    everything = np.arange(len(dataset.ids))
    return np.setdiff1d(everything, dataset.absent) if isinstance(dataset, ArrangedImages) else everything


def num_first(dataset: ImageDataset) -> int:
    """Return the number of images that the cache of a data set began with; all if none were appended."""
    return dataset.num_first if isinstance(dataset, ArrangedImages) else len(dataset.ids)


class ArrangedImages:
    """The images of a cache in its order, `num_first` of which it began with: an `ImageDataset`.

    `rows` [N] are their places in `images`, ABSENT for one that is not there, and `lacks` words that; `ids` are their
    names, labels and classes those of the order.
    """

    def __init__(
        self,
        images: ImageDataset,
        rows: NDArray[np.int64],
        num_first: int,
        ids: Sequence[str],
        labels: Labels,
        num_classes: int | None,
        class_names: tuple[str, ...] | None,
        lacks: str = "is not in the data set",
    ) -> None:
        self._images, self.rows, self.num_first, self._lacks = images, rows, num_first, lacks
        self.labels, self.num_classes, self.class_names = labels, num_classes, class_names
        self.ids: Sequence[str] = PackedIds(ids)

    @property
    def num_left_out(self) -> int:
        """Images of the data set that are in no place of the order."""
        return len(self._images.ids) - int(np.count_nonzero(self.rows != ABSENT))

    @property
    def absent(self) -> NDArray[np.int64]:
        """The places of images that the data set does not have."""
        return np.flatnonzero(self.rows == ABSENT)

    def without(self, places: NDArray[np.int64]) -> "ArrangedImages":
        """Return the same order in which some images are not there."""
        images = self._with(self._images, slice(None))
        images.rows = self.rows.copy()
        images.rows[places] = ABSENT
        return images

    def first(self, count: int) -> "ArrangedImages":
        """Return the first images of the order."""
        return self._with(self._images, slice(count))

    def _with(self, images: ImageDataset, places: slice) -> "ArrangedImages":
        rows, ids, labels = self.rows[places], self.ids[places], self.labels[places]
        num_first, classes = min(self.num_first, len(rows)), (self.num_classes, self.class_names)
        return ArrangedImages(images, rows, num_first, ids, labels, *classes, self._lacks)

    def _row(self, index: int) -> int:
        row = int(self.rows[index])
        if row == ABSENT:
            name = f" {self.ids[index]!r}" if self.ids[index] else ""
            raise DataError(f"image {index}{name} of the cache {self._lacks}. Fix: leave it out")
        return row

    def read(self, index: int) -> Tensor:
        """Return one image."""
        return self._images.read(self._row(index))

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several, read together if the data set offers that."""
        return read_images(self._images, [self._row(index) for index in indices])

    def sizes(self) -> NDArray[np.int64]:
        """Return height and width of each image, [N, 2]; those of an absent one mean nothing."""
        return np.asarray(self._images.sizes(), np.int64)[self.rows]

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of the images, [N]; those of an absent one mean nothing."""
        return self._images.digests()[self.rows]

    @property
    def orientation(self) -> Literal["ignore", "apply"]:
        """Handling of the EXIF orientation."""
        return orientation_of(self._images)

    def turned(self) -> NDArray[np.int64]:
        """Return which images have an orientation that is ignored."""
        found = self._images.turned() if isinstance(self._images, Turned) else np.empty(0, np.int64)
        return np.flatnonzero(np.isin(self.rows, found))

    def reduced(self, factors: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> "ArrangedImages":
        """Return the same images, decoded at 1/`factors`; raise RecipeError if the data set decodes no files."""
        return self._with(reduced(self._images, factors), slice(None))
