"""Data sets: what every kind offers, and the fingerprint that identifies one."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from logitcache.config.recipe import Component, Count, Extended
from logitcache.errors import DataError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UNLABELLED = -1
Labels = NDArray[np.int64 | np.int8]
"""One class an image, int64 [n], -1 for none; or, of images of any number of classes, int8 [n, C]: 1 for a class that
is there, 0 for one that is not, -1 if nobody knows."""

_BLOCK = 1 << 16


class DecodedImages(Protocol):
    """Decoded images in a fixed order. Instances can be pickled, for workers that are spawned."""

    def read(self, index: int) -> Tensor:
        """Return one image, uint8 [C, H, W]; DataError names one that is unreadable.

        Its memory may lie in another order: decoders write [H, W, C], and rearranging it costs as much as decoding.
        """

    def sizes(self) -> NDArray[np.int64]:
        """Return height and width of each image as `read` gives it, [n, 2]; decodes no file for it."""


class ImageDataset(DecodedImages, Protocol):
    """Decoded images with their names, classes and digests."""

    @property
    def ids(self) -> Sequence[str]:
        """Unique names in order; the same image keeps its name when the folder moves."""

    @property
    def labels(self) -> Labels:
        """Class indices [n], -1 if there is no label; or multi-hot rows [n, C]."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, of multi-hot labels C; None if no image has a label."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, when they have any."""

    def digests(self) -> NDArray[np.uint64]:
        """Return [n] the first 8 bytes, little endian, of the sha256 of each image's content.

        The content is the file's bytes, or `pixel_digest` of an image that is not a file.
        """


@runtime_checkable
class ReadsTogether(Protocol):
    """A data set that reads several images faster at once than one by one, as storage that answers late does."""

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return what `read` gives for each index."""


@runtime_checkable
class Turned(Protocol):
    """A data set of files that may have an EXIF orientation."""

    @property
    def orientation(self) -> Literal["ignore", "apply"]:
        """Handling of the EXIF orientation."""

    def turned(self) -> NDArray[np.int64]:
        """Return which images have an orientation that is ignored; decodes no file for it."""


@runtime_checkable
class Reducible(Protocol):
    """A data set of files, of which JPEG can be decoded in a lower resolution."""

    def reduced(self, factors: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> ImageDataset:
        """Return the same images, of which those in JPEG are decoded at 1/`factors` of their heights and widths.

        `factors` maps sizes [B, 2], as `sizes` gives them, to 1, 2, 4 or 8, [B]. Sides are rounded up.
        """


def orientation_of(dataset: ImageDataset) -> Literal["ignore", "apply"]:
    """Return how the EXIF orientation of images is handled: data sets of some kinds have none."""
    return dataset.orientation if isinstance(dataset, Turned) else "ignore"


def warn_of_orientation(dataset: ImageDataset) -> None:
    """Warn if images have an EXIF orientation that is ignored: they are seen turned or mirrored."""
    found = dataset.turned() if isinstance(dataset, Turned) else np.empty(0, np.int64)
    if len(found):
        warnings.warn(
            f"{len(found)} of {len(dataset.ids)} images, such as '{dataset.ids[int(found[0])]}', have an EXIF "
            "orientation that is ignored, as torchvision does: they are seen turned or mirrored. "
            "Fix: `orientation: apply` in `dataset:`",
            stacklevel=3,
        )


class DatasetBase(Extended, ABC):
    """An entry of `dataset`: how to open images."""

    added: ClassVar[frozenset[str]] = frozenset()

    def risks(self) -> tuple[str, ...]:
        """Name what only a user may have opened: a manifest may name the rest of an entry."""
        return ()

    @abstractmethod
    def open(self) -> ImageDataset:
        """Open the images; raises DataError if they are missing or unusable."""


class Fingerprint(Component):
    """What two data sets must share to be the same: names, order, classes, labels, sizes and every byte.

    `multi_label`: labels are multi-hot.
    """

    num_images: Count
    num_classes: Count | None
    multi_label: bool = False
    class_names: Sha256 | None
    ids: Sha256
    labels: Sha256
    sizes: Sha256
    content: Sha256

    @model_validator(mode="after")
    def _classes_are_counted(self) -> Self:
        if self.multi_label and self.num_classes is None:
            raise ValueError("multi-hot labels of an unknown number of classes")
        return self


def read_images(dataset: DecodedImages, indices: Sequence[int]) -> list[Tensor]:
    """Return several images, read together if the data set offers that."""
    if isinstance(dataset, ReadsTogether):
        return dataset.read_batch(indices)
    return [dataset.read(index) for index in indices]


def fingerprint(dataset: ImageDataset) -> Fingerprint:
    """Return the fingerprint of a data set; reads every image that is not remembered.

    Raises DataError for multi-hot labels of another number of classes than is stated.
    """
    labels = dataset.labels
    if is_multi_label(labels) and labels.shape[1] != dataset.num_classes:
        raise DataError(
            f"labels {list(labels.shape)} are of {labels.shape[1]} classes, the data set's num_classes is "
            f"{dataset.num_classes}.\n  Fix: one number for each class, or correct num_classes."
        )
    return Fingerprint(
        num_images=len(dataset.ids),
        num_classes=dataset.num_classes,
        multi_label=is_multi_label(labels),
        class_names=None if dataset.class_names is None else names_digest(dataset.class_names),
        ids=names_digest(dataset.ids),
        labels=_numbers_digest(labels, label_dtype(labels.ndim)),
        sizes=_numbers_digest(dataset.sizes(), np.dtype("<i8")),
        content=hashlib.sha256(np.ascontiguousarray(dataset.digests(), "<u8").data).hexdigest(),
    )


def is_multi_label(labels: Labels) -> bool:
    """Return whether labels are multi-hot: any number of classes an image."""
    return labels.ndim == 2


def label_dtype(ndim: int) -> np.dtype[np.int64 | np.int8]:
    """Return the type that labels of so many axes are stored and digested in."""
    return np.dtype("<i8") if ndim == 1 else np.dtype(np.int8)


def pixel_digest(image: Tensor) -> int:
    """Return the first 8 bytes of the sha256 of an image's shape (int64) and pixels."""
    shape = np.array(image.shape, "<i8").tobytes()
    # In the order of the axes, however they lie in memory.
    return digest_of(shape + image.numpy().tobytes("C"))


def digest_of(content: bytes) -> int:
    """Return the first 8 bytes of the sha256 of an image's content as a number."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def _numbers_digest(numbers: Labels, dtype: np.dtype[Any]) -> str:
    """Return the sha256 of whole numbers; block by block, as sizes may be a view of one row."""
    state = hashlib.sha256()
    for start in range(0, len(numbers), _BLOCK):
        state.update(np.ascontiguousarray(numbers[start : start + _BLOCK], dtype).data)
    return state.hexdigest()


def names_digest(names: Sequence[str]) -> str:
    state = hashlib.sha256()
    for number, name in enumerate(names):
        # File names need not be valid UTF-8; their own bytes count.
        state.update(("\n" if number else "").encode() + name.encode(errors="surrogateescape"))
    return state.hexdigest()
