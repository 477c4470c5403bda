"""Crops: of the centre, anywhere, and of a random area and aspect ratio."""

from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from logitcache.config.recipe import Lenient, Positive
from logitcache.errors import DataError
from logitcache.views.augmentations.base import (
    AugmentationBase,
    Fill,
    Interpolation,
    Ints,
    Ordered,
    RatioKnots,
    ResizingBase,
    Size,
    TorchvisionBase,
    drawn_sides,
    kernels,
    no_params,
    pair,
    sizes_of,
)
from logitcache.views.augmentations.resize import Kernel, resized
from logitcache.views.keys import Draws, below, uniform

NUM_TRIES = 10
Share = Annotated[float, Field(gt=0.0, le=1.0), Lenient]


class CenterCrop(TorchvisionBase):
    """Crop the centre; an image that is too small is padded with black."""

    kind: Literal["center_crop"] = "center_crop"
    size: Size = Field(description="Side of the square in pixels, or [height, width].", examples=[224, [224, 192]])

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw nothing."""
        return no_params(len(sizes)), sizes_of(len(sizes), pair(self.size))

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop the centre."""
        return cast(Tensor, kernels().center_crop(images, list(pair(self.size))))


class RandomCrop(AugmentationBase):
    """Pad every side, then crop a window anywhere."""

    columns: ClassVar[tuple[str, ...]] = ("top", "left")

    kind: Literal["random_crop"] = "random_crop"
    size: Size = Field(description="Side of the window in pixels, or [height, width].", examples=[32, [32, 28]])
    padding: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Pixels added to every side before the crop."
    )
    padding_mode: Literal["constant", "edge", "reflect", "symmetric"] = Field(
        default="constant",
        description="Content of the padding: the level `fill`, the border's pixels, or the mirrored image without "
        "or with its border.",
    )
    fill: Fill = Field(default=0, description="Level of the padding, 0 to 255, if `padding_mode` is `constant`.")

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is padded in the way that the options state."""
        if self.padding == 0 and (self.padding_mode != "constant" or self.fill != 0):
            return "has padding: 0, and nothing is padded. Fix: leave out padding_mode and fill, or raise padding"
        if self.padding_mode != "constant" and self.fill != 0:
            return f"pads by {self.padding_mode}, which takes no fill. Fix: leave it out, or padding_mode: constant"
        return None

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top and left, in the padded image."""
        size = np.array(pair(self.size))
        corners = sizes + 2 * self.padding - size + 1
        if (corners < 1).any():
            row = int(np.argmin(corners.min(axis=1)))
            raise DataError(
                f"random_crop to {pair(self.size)} does not fit image {int(draws.indices[row])} of size "
                f"{tuple(sizes[row].tolist())} with padding {self.padding}. Fix: resize first, or raise the padding"
            )
        # A reflection repeats no pixel twice.
        missing = {"reflect": self.padding + 1, "symmetric": self.padding}.get(self.padding_mode, 0) - sizes.min(axis=1)
        if (missing > 0).any():
            row = int(np.argmax(missing))
            raise DataError(
                f"random_crop cannot pad image {int(draws.indices[row])} of size {tuple(sizes[row].tolist())} by "
                f"{self.padding} with {self.padding_mode}, which repeats no pixel twice. Fix: padding_mode: edge, less "
                "padding, or resize first"
            )
        return below(draws.words("crop", ordinal, 2), corners), sizes_of(len(sizes), pair(self.size))

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Pad and crop."""
        if self.padding:
            widths = ((0, 0), (0, 0), (self.padding, self.padding), (self.padding, self.padding))
            options: dict[str, Any] = {"constant_values": self.fill} if self.padding_mode == "constant" else {}
            images = torch.from_numpy(np.pad(images.numpy(), widths, self.padding_mode, **options))
        height, width = pair(self.size)
        windows = images.unfold(2, height, 1).unfold(3, width, 1).numpy()
        return torch.from_numpy(windows[np.arange(len(images)), :, params[:, 0], params[:, 1]])


class RandomResizedCrop(ResizingBase):
    """Crop a random area and aspect ratio, then resize to `size`."""

    columns: ClassVar[tuple[str, ...]] = ("top", "left", "height", "width")

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    size: Size = Field(description="Side of the result in pixels, or [height, width].", examples=[224, [224, 192]])
    scale: Annotated[tuple[Share, Share], Ordered] = Field(
        default=(0.08, 1.0), description="Range of the crop's area, as fractions of the image's."
    )
    ratio: Annotated[tuple[Positive, Positive], Ordered] = Field(
        default=(0.75, 1.3333333333333333),
        description="Range of the crop's aspect ratio, width to height, drawn uniformly in its logarithm.",
    )
    interpolation: Interpolation = Field(default="bilinear", description="Interpolation of the resize.")
    kernel: Kernel = Field(
        default="torchvision",
        description="Arithmetic of the resize. `torchvision` is fast, and its pixels may differ by one level "
        "between CPUs; `exact` uses integer weights and gives the same bytes on every machine.",
    )
    ratio_knots: RatioKnots = Field(default=(), description="Computed from `ratio`; leave it out.", examples=[[]])

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw top, left, height and width: the first of ten tries that fits, else the largest central crop."""
        words = draws.words("resized_crop", ordinal, 2 * NUM_TRIES + 2)
        height, width = sizes[:, :1], sizes[:, 1:]
        area = (height * width) * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform(words[:, :NUM_TRIES]))
        widths, heights = drawn_sides(words[:, NUM_TRIES : 2 * NUM_TRIES], area, self.ratio_knots)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
        boxes = np.stack([heights[rows, first], widths[rows, first]], axis=1)
        corners = below(words[:, 2 * NUM_TRIES :], sizes - boxes + 1)
        none = ~fits.any(axis=1)
        boxes[none] = self._central(sizes[none])
        corners[none] = (sizes[none] - boxes[none]) // 2
        return np.concatenate([corners, boxes], axis=1), sizes_of(len(sizes), pair(self.size))

    def smallest(self, sizes: Ints) -> Ints:
        """Return the sides of the smallest area in the narrowest and the flattest ratio, or of the central crop.

        Products, quotients and roots that round correctly keep their order: no word draws less.
        """
        area = (sizes[:, 0] * sizes[:, 1]) * self.scale[0]
        sides = [np.sqrt(area / self.ratio_knots[-1]), np.sqrt(area * self.ratio_knots[0])]
        drawn: Ints = np.rint(np.stack(sides, axis=1)).astype(np.int64)
        smallest: Ints = np.minimum(drawn, self._central(sizes))
        return smallest

    def results(self, sizes: Ints) -> Ints:
        """Return `size`."""
        return sizes_of(len(sizes), pair(self.size))

    def _central(self, sizes: Ints) -> Ints:
        height, width = sizes[:, 0], sizes[:, 1]
        low, high = self.ratio
        tall = np.clip(np.rint(width / low), 1, height).astype(np.int64)
        wide = np.clip(np.rint(height * high), 1, width).astype(np.int64)
        ratio = width / height
        return np.stack([np.where(ratio < low, tall, height), np.where(ratio > high, wide, width)], axis=1)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop and resize with antialiasing."""
        return resized(images, params, pair(self.size), self.interpolation, self.kernel)
