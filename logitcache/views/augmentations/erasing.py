"""Erasing a random rectangle."""

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from logitcache.config.recipe import Fraction, Positive
from logitcache.runtime.device import to_device
from logitcache.views.augmentations.base import (
    AugmentationBase,
    Fill,
    Ordered,
    RatioKnots,
    Scale,
    boxes_mask,
    drawn_sides,
    levels_of,
    require_values,
    rescaled_boxes,
)
from logitcache.views.keys import Draws, Ints, below, bernoulli, philox, uniform

NUM_TRIES = 10


class RandomErasing(AugmentationBase):
    """Fill a rectangle of random area, aspect ratio and position.

    `value: noise` is uniform bytes drawn from the key, where torchvision's `random` is Gaussian.
    """

    columns: ClassVar[tuple[str, ...]] = ("top", "left", "height", "width", "noise_0", "noise_1")

    kind: Literal["random_erasing"] = "random_erasing"
    p: Fraction = Field(default=0.5, description="Probability that a rectangle is erased.")
    scale: Annotated[tuple[Fraction, Fraction], Ordered] = Field(
        default=(0.02, 0.33), description="Range of the rectangle's area, as fractions of the image's."
    )
    ratio: Annotated[tuple[Positive, Positive], Ordered] = Field(
        default=(0.3, 3.3),
        description="Range of the rectangle's aspect ratio, height to width, drawn uniformly in its logarithm.",
    )
    value: Fill | Annotated[tuple[Fill, ...], Field(min_length=1)] | Literal["noise"] = Field(
        default=0,
        description="Content of the rectangle: a level from 0 to 255, a list of one level for each channel, or "
        "`noise`.",
    )
    ratio_knots: RatioKnots = Field(
        default=(), description="Computed from `ratio`; do not set it yourself.", examples=[[]]
    )

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is ever erased."""
        if self.scale[1] == 0:
            return "has scale up to 0 and erases nothing. Fix: raise scale, or leave it out"
        return super().idle(epochs)

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top, left, height and width, all 0 if nothing is erased, and two words that key the noise.

        The rectangle is the first of ten tries that is smaller than the image in both directions.
        """
        words = draws.words("erase", ordinal, 2 * NUM_TRIES + 5)
        low, high = self.scale
        area = sizes.prod(axis=1, keepdims=True) * (low + (high - low) * uniform(words[:, :NUM_TRIES]))
        heights, widths = drawn_sides(words[:, NUM_TRIES : 2 * NUM_TRIES], area, self.ratio_knots)
        fits = (heights < sizes[:, :1]) & (widths < sizes[:, 1:])
        first = fits.argmax(axis=1)[:, None]
        boxes = np.concatenate([np.take_along_axis(side, first, axis=1) for side in (heights, widths)], axis=1)
        corner, bit, key = np.split(words[:, 2 * NUM_TRIES :], [2, 3], axis=1)
        erased = fits.any(axis=1, keepdims=True) & bernoulli(bit, self.p)
        boxes = np.where(erased, boxes, 0)
        corners = np.where(erased, below(corner, sizes - boxes + 1), 0)
        return np.concatenate([corners, boxes, key.astype(np.int64)], axis=1), sizes

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return the same with a level that images of so many channels have."""
        if not isinstance(self.value, tuple):
            return self
        return self.model_copy(update={"value": levels_of(self.value, channels)})

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Scale the rectangles."""
        return np.concatenate([rescaled_boxes(params[:, :4], before, others), params[:, 4:]], axis=1), others

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Fill the rectangles."""
        constant = self._constant(images)
        rows = np.flatnonzero(params[:, 2:4].all(axis=1)).tolist()
        if not rows:
            return images
        result = images.clone()
        for row in rows:
            top, left, height, width, *key = params[row].tolist()
            box = result[row, :, top : top + height, left : left + width]
            box[:] = _noise((key[0], key[1]), tuple(box.shape)) if self.value == "noise" else constant
        return result

    def _constant(self, images: Tensor) -> Tensor:
        """Return the level of each channel, uint8 [C or 1, 1, 1]; 0 stands for noise."""
        levels = self.value if isinstance(self.value, tuple) else (self.value if isinstance(self.value, int) else 0,)
        require_values("random_erasing.value", levels, images)
        return torch.tensor(levels, dtype=torch.uint8)[:, None, None]

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take images of any size."""
        return True

    def apply_in_batches(self, images: Tensor, params: Ints) -> Tensor:
        """Fill the rectangles."""
        rows = np.flatnonzero(params[:, 2:4].all(axis=1))
        if not len(rows):
            return images
        if self.value == "noise":  # drawn here, and moved to the images
            filled = self.apply(torch.zeros((len(rows), *images.shape[1:]), dtype=torch.uint8), params[rows])
        else:
            filled = self._constant(images)
        boxes = to_device(torch.from_numpy(params[rows, :4]), images.device)
        chosen = to_device(torch.from_numpy(rows), images.device)
        mask = boxes_mask(boxes, images.shape[2], images.shape[3])
        result = images.clone()
        result[chosen] = torch.where(mask, to_device(filled, images.device), images[chosen])
        return result


def _noise(key: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Return uniform bytes of `shape`: the Philox words of counters 0, 1, …, lowest byte first."""
    count = int(np.prod(shape))
    counters = np.arange(-(-count // 16), dtype=np.uint64)
    zeros = np.zeros_like(counters)
    words: NDArray[np.uint64] = np.stack(philox((counters, zeros, zeros, zeros), key), axis=1)
    return torch.from_numpy(words.astype("<u4").view(np.uint8).ravel()[:count].reshape(shape))
