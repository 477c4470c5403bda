"""Scaled decoding: the scale at which a JPEG file is decoded, from its size and the augmentations alone."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationInfo

from logitcache.errors import RecipeError
from logitcache.views.augmentations.base import AugmentationBase, ResizingBase
from logitcache.views.datasets.base import ImageDataset, Reducible
from logitcache.views.keys import Ints

_FACTORS = (2, 4, 8)


def resizing(augmentations: Sequence[AugmentationBase]) -> ResizingBase | None:
    """Return the augmentation that makes the resolution of the images indifferent; None if one before it counts pixels.

    Flips and colours may come before it.
    """
    first = next((one for one in augmentations if not one.scale_free), None)
    return first if isinstance(first, ResizingBase) else None


def _with_resizing(decode: str, info: ValidationInfo) -> str:
    """Raise ValueError for scaled decoding of images of which an augmentation counts the pixels."""
    if decode == "scaled" and "augmentations" in info.data and resizing(info.data["augmentations"]) is None:
        raise ValueError(
            "scaled needs a resize or a random_resized_crop, with none before it but horizontal_flip, color_jitter and "
            "random_grayscale: others count the pixels of the file. Move it to the front, or leave decode out"
        )
    return decode


Decode = Annotated[
    Literal["full", "scaled"],
    AfterValidator(_with_resizing),
    Field(
        description="Resolution at which files are decoded. `scaled` decodes JPEG at 1/2, 1/4 or 1/8 of its height and "
        "width: the smallest scale at which every crop that the augmentations can draw has at least the pixels of the "
        "result. It is meant for large photographs, whose decoding costs most. Other files are decoded in full."
    ),
]
"""Of a component with `augmentations` before it."""


def factors(augmentations: Sequence[AugmentationBase], sizes: Ints) -> Ints:
    """Return by which factor images of `sizes` [B, 2] are reduced, 1, 2, 4 or 8, [B].

    Sides of a reduced image are rounded up, as libjpeg does.
    """
    chosen, deciding = np.ones(len(sizes), np.int64), resizing(augmentations)
    assert deciding is not None, "refused as the views were described"
    for factor in _FACTORS:
        reduced = -(-sizes // factor)
        enough = (deciding.smallest(reduced) >= deciding.results(reduced)).all(axis=1)
        chosen[enough & (sizes.min(axis=1) >= factor)] = factor
    return chosen


def reduced(dataset: ImageDataset, chosen: Callable[[Ints], Ints]) -> ImageDataset:
    """Return a data set whose JPEG is decoded at 1/`chosen`; raise RecipeError for one that decodes no files."""
    if not isinstance(dataset, Reducible):
        raise RecipeError(
            "views.decode: scaled reduces JPEG files as they are decoded, and these images are not decoded from files "
            "by logitcache. Fix: decode: full, or name the files by a dataset of kind image_folder, webdataset or "
            "huggingface"
        )
    return dataset.reduced(chosen)
