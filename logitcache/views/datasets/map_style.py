"""Map style: any object with `__len__` and `__getitem__`, as torch's own data sets are."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import DataError, LogitCacheError
from logitcache.runtime.console import track
from logitcache.views.datasets.base import Labels, pixel_digest
from logitcache.views.datasets.images.labels import LabelTable, as_label
from logitcache.views.datasets.images.random_state import elsewhere, position, torch_untouched, untouched
from logitcache.views.datasets.scan_memory import Scan, ScanMemory, ScannedImages


class MapStyle(Protocol):
    """What is indexed: an image, or an image with its class or its multi-hot classes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


class MapImages(ScannedImages):
    """A map-style object as a data set; labels, sizes and digests are found in one pass, when asked for.

    `decode` turns the image of an item into uint8 [C, H, W] and raises ValueError if it cannot.
    """

    def __init__(
        self,
        source: MapStyle,
        name: str,
        ids: Sequence[str],
        decode: Callable[[object], Tensor],
        class_names: tuple[str, ...] | None = None,
        num_classes: int | None = None,
        memory: ScanMemory | None = None,
    ) -> None:
        super().__init__(ids, name, class_names, num_classes, memory)
        self._source, self._decode = source, decode
        self._draws = False
        self._draws = self._check_repeatable()

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises DataError naming an image that cannot be read."""
        return self._image(index)[0]

    def sizes(self) -> NDArray[np.int64]:
        """Return the heights and widths of all images [n, 2]."""
        return self.scan.sizes

    def _read_all(self) -> Scan:
        num_images = len(self.ids)
        labels = LabelTable(num_images)
        sizes = np.empty((num_images, 2), np.int64)

        def digest(index: int) -> int:
            image, label = self._item(index)
            try:
                labels.put(index, label)
            except ValueError as cause:
                raise self._unusable(index, cause) from cause
            sizes[index] = image.shape[1:]
            return pixel_digest(image)

        places = track(range(num_images), f"reading {self._name}", num_images)
        with untouched():
            digests = np.fromiter(map(digest, places), np.uint64)
        return Scan(labels.values, sizes, digests)

    def _item(self, index: int) -> tuple[Tensor, Labels]:
        image, label = self._image(index)
        try:
            return image, as_label(label)
        except Exception as cause:  # numpy may raise anything too
            raise self._unusable(index, cause) from cause

    def _image(self, index: int) -> tuple[Tensor, object]:
        """Return the image and the label of an item, the label as it is."""
        try:
            with untouched() if self._draws else torch_untouched():
                image, label = _split(self._source[index])
                return self._decode(image), label
        except LogitCacheError:
            raise
        except Exception as cause:  # the object's own code may raise anything
            raise self._unusable(index, cause) from cause

    def _unusable(self, index: int, cause: Exception) -> DataError:
        reason = str(cause) if isinstance(cause, ValueError) else repr(cause)
        return DataError(f"image '{self.ids[index]}' (index {index}) of {self._name} cannot be used: {reason}.")

    def _check_repeatable(self) -> bool:
        """Read a few images twice; returns whether that draws from Python's or numpy's generator.

        Raises DataError for an image that comes out different.
        """
        draws = False
        for index in sorted({0, len(self.ids) // 2, len(self.ids) - 1}):
            with elsewhere(1):
                before = position()
                first, label = self._item(index)
                draws |= position() != before
            with elsewhere(2):
                again, label_again = self._item(index)
            if pixel_digest(first) != pixel_digest(again) or not np.array_equal(label, label_again):
                raise DataError(
                    f"image '{self.ids[index]}' of {self._name} comes out different when it is "
                    "read twice.\n  Fix: take random augmentation out of it; the views augment."
                )
        return draws


def num_items(source: MapStyle, name: str) -> int:
    """Return the length; raises DataError for an object with none, or with no images."""
    try:
        length = len(source)
    except TypeError as cause:
        raise DataError(
            f"{name} has no length.\n  Fix: give it __len__ and __getitem__; a stream of images has no order to replay."
        ) from cause
    if length == 0:
        raise DataError(f"{name} holds no images.\n  Fix: correct where it reads from.")
    return length


def _split(item: object) -> tuple[object, object]:
    """Return the image and the label of an item; None stands for no label."""
    if isinstance(item, dict):
        raise ValueError(f"an item is an image or (image, label), not a dict with {sorted(map(str, item))}")
    if not isinstance(item, tuple | list):
        return item, None
    if len(item) not in (1, 2):
        raise ValueError(f"an item is an image or (image, label), not {len(item)} values")
    return item[0], item[1] if len(item) == 2 else None
