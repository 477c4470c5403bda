"""Crops: of the centre, anywhere, and of a random area and aspect ratio."""

from typing import Annotated, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from logitcache.errors import DataError
from logitcache.recipe import Component, Float, Positive
from logitcache.views.augmentations.base import (
    Fill,
    Interpolation,
    Ints,
    Size,
    look_up,
    no_params,
    pair,
    ratio_table,
    sizes_of,
)
from logitcache.views.augmentations.resize import resize
from logitcache.views.keys import Draws, below, uniform

NUM_TRIES = 10


class CenterCrop(Component):
    """Crop the centre; an image that is too small is padded with black."""

    kind: Literal["center_crop"] = "center_crop"
    size: Size

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw nothing."""
        return no_params(len(sizes)), sizes_of(len(sizes), pair(self.size))

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop the centre."""
        cropped: Tensor = F.center_crop(images, list(pair(self.size)))
        return cropped


class RandomCrop(Component):
    """Pad every side, then crop a window of `size` anywhere."""

    kind: Literal["random_crop"] = "random_crop"
    size: Size
    padding: Annotated[int, Field(ge=0)] = 0
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = "constant"
    fill: Fill = 0

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top and left, in the padded image."""
        size = np.array(pair(self.size))
        room = sizes + 2 * self.padding - size + 1
        if (room < 1).any():
            row = int(np.argmin(room.min(axis=1)))
            raise DataError(
                f"random_crop to {pair(self.size)} does not fit image {int(draws.indices[row])} of size "
                f"{tuple(sizes[row].tolist())} with padding {self.padding}. Fix: resize first, or raise the padding"
            )
        self._require_mirrored(draws, sizes)
        return below(draws.words("crop", ordinal, 2), room), sizes_of(len(sizes), pair(self.size))

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
        windows = sliding_window_view(images.numpy(), pair(self.size), axis=(2, 3))
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
        return ratio_table(info.data["ratio"], knots) if "ratio" in info.data else knots

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top, left, height and width: the first of ten tries that fits, else the largest central crop."""
        words = draws.words("resized_crop", ordinal, 2 * NUM_TRIES + 2)
        height, width = sizes[:, :1], sizes[:, 1:]
        area = (height * width) * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform(words[:, :NUM_TRIES]))
        aspect = look_up(self.ratio_knots, uniform(words[:, NUM_TRIES : 2 * NUM_TRIES]))
        widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.argmax(axis=1)[:, None]
        boxes = np.concatenate([np.take_along_axis(side, first, axis=1) for side in (heights, widths)], axis=1)
        boxes = np.where(fits.any(axis=1, keepdims=True), boxes, self._central(sizes))
        corners = below(words[:, 2 * NUM_TRIES :], sizes - boxes + 1)
        corners = np.where(fits.any(axis=1, keepdims=True), corners, (sizes - boxes) // 2)
        return np.concatenate([corners, boxes], axis=1), sizes_of(len(sizes), pair(self.size))

    def _central(self, sizes: Ints) -> Ints:
        height, width = sizes[:, 0], sizes[:, 1]
        low, high = self.ratio
        tall = np.clip(np.rint(width / low), 1, height).astype(np.int64)
        wide = np.clip(np.rint(height * high), 1, width).astype(np.int64)
        ratio = width / height
        return np.stack([np.where(ratio < low, tall, height), np.where(ratio > high, wide, width)], axis=1)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop and resize with antialiasing."""
        size = list(pair(self.size))
        boxes = [
            image[:, top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(images, params.tolist(), strict=True)
        ]
        return torch.stack([resize(box, size, self.interpolation) for box in boxes])
