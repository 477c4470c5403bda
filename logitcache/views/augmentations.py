"""Augmentations: integer parameters planned from keys, applied to uint8 pixels.

Each has two verbs. `plan` draws the parameters of a batch, int64 [B, P], from the words of the keys and the images'
sizes [B, 2] (height, width), and tells the sizes that result. `apply` gives images of one size, uint8 [B, C, H, W],
their parameters. Semantics are those of the torchvision v2 transform of the same name. Integers and exact float64
arithmetic only, no exp, log or pow: their bytes differ between numpy releases.
"""

import math
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.errors import DataError
from logitcache.recipe import Component, Count, Float, Fraction, Positive
from logitcache.views.keys import Draws, below, bernoulli, uniform

Ints = NDArray[np.int64]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Size = Count | tuple[Count, Count]
"""A side, or height and width."""

NUM_TRIES = 10
NUM_KNOTS = 65


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _sizes(count: int, size: tuple[int, int]) -> Ints:
    return np.tile(np.array(size, dtype=np.int64), (count, 1))


def _nothing(count: int) -> Ints:
    return np.empty((count, 0), dtype=np.int64)


def _resize(image: Tensor, size: list[int], interpolation: Interpolation) -> Tensor:
    resized: Tensor = F.resize(image, size, InterpolationMode(interpolation), antialias=True)
    return resized


class Resize(Component):
    """Resize: an integer is the length of the shorter side, a pair is height and width."""

    kind: Literal["resize"] = "resize"
    size: Size
    interpolation: Interpolation = "bilinear"

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Compute the new height and width."""
        if isinstance(self.size, int):
            scaled = self.size * sizes // sizes.min(axis=1, keepdims=True)
        else:
            scaled = _sizes(len(sizes), self.size)
        return scaled, scaled

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Resize with antialiasing."""
        return torch.stack(
            [_resize(image, size, self.interpolation) for image, size in zip(images, params.tolist(), strict=True)]
        )


class CenterCrop(Component):
    """Crop the centre; an image that is too small is padded with black."""

    kind: Literal["center_crop"] = "center_crop"
    size: Size

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw nothing."""
        return _nothing(len(sizes)), _sizes(len(sizes), _pair(self.size))

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop the centre."""
        cropped: Tensor = F.center_crop(images, list(_pair(self.size)))
        return cropped


class RandomCrop(Component):
    """Pad every side, then crop a window of `size` anywhere."""

    kind: Literal["random_crop"] = "random_crop"
    size: Size
    padding: Annotated[int, Field(ge=0)] = 0
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant"
    fill: Annotated[int, Field(ge=0, le=255)] = 0

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top and left, in the padded image."""
        size = np.array(_pair(self.size))
        room = sizes + 2 * self.padding - size + 1
        if (room < 1).any():
            row = int(np.argmin(room.min(axis=1)))
            raise DataError(
                f"random_crop to {_pair(self.size)} does not fit image {int(draws.indices[row])} of size "
                f"{tuple(sizes[row].tolist())} with padding {self.padding}. Fix: resize first, or raise the padding"
            )
        self._require_mirrored(draws, sizes)
        return below(draws.words("crop", ordinal, 2), room), _sizes(len(sizes), _pair(self.size))

    def _require_mirrored(self, draws: Draws, sizes: Ints) -> None:
        """Raise DataError for an image with fewer pixels than a reflection would repeat."""
        missing = {"reflect": self.padding + 1, "symmetric": self.padding}.get(self.padding_mode, 0) - sizes.min(axis=1)
        if (missing > 0).any():
            row = int(np.argmax(missing))
            raise DataError(
                f"random_crop cannot pad image {int(draws.indices[row])} of size {tuple(sizes[row].tolist())} by "
                f"{self.padding} with {self.padding_mode}, which repeats no pixel twice. Fix: padding_mode: edge, less "
                "padding, or resize first"
            )

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Pad and crop."""
        if self.padding:
            fill = float(self.fill) if self.padding_mode == "constant" else None
            images = F.pad(images, [self.padding], fill=fill, padding_mode=self.padding_mode)
        windows = sliding_window_view(images.numpy(), _pair(self.size), axis=(2, 3))
        return torch.from_numpy(windows[np.arange(len(images)), :, params[:, 0], params[:, 1]])


class RandomResizedCrop(Component):
    """Crop a random area and aspect ratio, then resize to `size`.

    `ratio_knots` tabulates exp over the range of log aspect ratios, linear in between (relative error below 2e-5 for
    the default range); it is part of the stored form, so that no replay computes exp.
    """

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    size: Size
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    interpolation: Interpolation = "bilinear"
    ratio_knots: tuple[Float, ...] = Field(default=(), validate_default=True)

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the smaller number comes first: [{value[1]}, {value[0]}]")
        return value

    @field_validator("ratio_knots")
    @classmethod
    def _tabulate(cls, knots: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if "ratio" not in info.data:
            return knots
        low, high = (math.log(value) for value in info.data["ratio"])
        exact = (math.exp(low + (high - low) * k / (NUM_KNOTS - 1)) for k in range(NUM_KNOTS))
        table = tuple(float(f"{value:.12g}") for value in exact)  # the last digits of exp depend on the C library
        if knots and (len(knots) != NUM_KNOTS or any(abs(a - b) > 1e-9 * b for a, b in zip(knots, table, strict=True))):
            raise ValueError("the table does not belong to `ratio`: leave it out, it is computed")
        return knots or table

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top, left, height and width: the first of ten tries that fits, else the largest central crop."""
        words = draws.words("resized_crop", ordinal, 2 * NUM_TRIES + 2)
        height, width = sizes[:, :1], sizes[:, 1:]
        area = (height * width) * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform(words[:, :NUM_TRIES]))
        aspect = self._aspect(uniform(words[:, NUM_TRIES : 2 * NUM_TRIES]))
        widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.argmax(axis=1)[:, None]
        boxes = np.concatenate([np.take_along_axis(side, first, axis=1) for side in (heights, widths)], axis=1)
        boxes = np.where(fits.any(axis=1, keepdims=True), boxes, self._central(sizes))
        corners = below(words[:, 2 * NUM_TRIES :], sizes - boxes + 1)
        corners = np.where(fits.any(axis=1, keepdims=True), corners, (sizes - boxes) // 2)
        return np.concatenate([corners, boxes], axis=1), _sizes(len(sizes), _pair(self.size))

    def _aspect(self, where: NDArray[np.float64]) -> NDArray[np.float64]:
        knots = np.array(self.ratio_knots)
        place = where * (NUM_KNOTS - 1)
        knot = place.astype(np.int64)
        aspect: NDArray[np.float64] = knots[knot] + (knots[knot + 1] - knots[knot]) * (place - knot)
        return aspect

    def _central(self, sizes: Ints) -> Ints:
        height, width = sizes[:, 0], sizes[:, 1]
        low, high = self.ratio
        tall = np.clip(np.rint(width / low), 1, height).astype(np.int64)
        wide = np.clip(np.rint(height * high), 1, width).astype(np.int64)
        ratio = width / height
        return np.stack([np.where(ratio < low, tall, height), np.where(ratio > high, wide, width)], axis=1)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop and resize with antialiasing."""
        size = list(_pair(self.size))
        boxes = [
            image[:, top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(images, params.tolist(), strict=True)
        ]
        return torch.stack([_resize(box, size, self.interpolation) for box in boxes])


class HorizontalFlip(Component):
    """Mirror left and right with probability `p`."""

    kind: Literal["horizontal_flip"] = "horizontal_flip"
    p: Fraction = 0.5

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw one bit."""
        return bernoulli(draws.words("flip", ordinal, 1), self.p).astype(np.int64), sizes

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Mirror where the bit is set."""
        chosen = torch.from_numpy(params[:, 0]).bool()[:, None, None, None]
        return torch.where(chosen, images.flip(-1), images)


Augmentation = Annotated[
    Resize | CenterCrop | RandomCrop | RandomResizedCrop | HorizontalFlip, Field(discriminator="kind")
]
