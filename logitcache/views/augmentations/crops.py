"""Crops: of the centre, anywhere, and of a random area and aspect ratio."""

from typing import Annotated, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from logitcache.config.recipe import Lenient, Positive
from logitcache.errors import DataError
from logitcache.runtime.device import to_device
from logitcache.views.augmentations.base import (
    AugmentationBase,
    Fill,
    Interpolation,
    Ordered,
    RatioKnots,
    ResizingBase,
    Scale,
    Size,
    TorchvisionBase,
    drawn_sides,
    kernels,
    no_params,
    pair,
    rescaled_boxes,
    sizes_of,
)
from logitcache.views.augmentations.resize import Kernel, crop_and_resize, resampled_together
from logitcache.views.keys import Draws, Ints, below, uniform

NUM_TRIES = 10
Share = Annotated[float, Field(gt=0.0, le=1.0), Lenient]


PaddingMode = Literal["constant", "edge", "reflect", "symmetric"]


class Window(TorchvisionBase):
    """Cut windows that may reach beyond the image, and resize those of another size: a crop of paired images."""

    columns: ClassVar[tuple[str, ...]] = ("top", "left", "height", "width")

    kind: Literal["window"] = "window"
    size: tuple[int, int]
    padding_mode: PaddingMode = "constant"
    fill: Fill = 0

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw nothing: windows are carried from the teacher's images."""
        raise AssertionError("windows are carried")

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Pad the images so that they contain every window, and crop."""
        starts, stops = params[:, :2], params[:, :2] + params[:, 2:]
        low = np.maximum(-starts.min(axis=0), 0)
        high = np.maximum(stops.max(axis=0) - np.array(images.shape[2:]), 0)
        images = padded(images, ((0, 0), (0, 0), *zip(low.tolist(), high.tolist(), strict=True)), self)
        if (params[:, 2:] == self.size).all():
            return windows(images, starts + low, self.size)
        boxes = np.concatenate([starts + low, params[:, 2:]], axis=1)
        return crop_and_resize(images, boxes, self.size, "bilinear", "exact")


def padded(images: Tensor, widths: tuple[tuple[int, int], ...], crop: "RandomCrop | Window") -> Tensor:
    """Pad the axes of images [B, C, H, W] as a crop does."""
    if not np.any(widths):
        return images
    if crop.padding_mode == "constant":  # in less time than np.pad
        (top, bottom), (left, right) = widths[2:]
        return functional.pad(images, (left, right, top, bottom), value=crop.fill)
    return torch.from_numpy(np.pad(images.numpy(), widths, crop.padding_mode))


def windows(images: Tensor, corners: Ints, size: tuple[int, int]) -> Tensor:
    """Cut a window out of each image [B, C, H, W], all of one size."""
    every = images.unfold(2, size[0], 1).unfold(3, size[1], 1).numpy()
    return torch.from_numpy(every[np.arange(len(images)), :, corners[:, 0], corners[:, 1]])


def _carried(corners: Ints, size: Size, before: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
    """Carry windows of one size, [B, 2] corners in images of sizes `before`, to paired images; also their new sizes.

    Of images that are scaled as the views are, they keep one size, and no pixel is resampled.
    """
    boxes = np.concatenate([corners, sizes_of(len(corners), pair(size))], axis=1)
    carried, sides = rescaled_boxes(boxes, before, others), sizes_of(len(corners), scale.pair(size))
    alike = (others == scale(before)).all(axis=1, keepdims=True)
    return np.concatenate([carried[:, :2], np.where(alike, sides, carried[:, 2:])], axis=1), sides


class CenterCrop(TorchvisionBase):
    """Crop the centre; an image that is too small is padded with black."""

    kind: Literal["center_crop"] = "center_crop"
    size: Size = Field(description="Side of the square in pixels, or [height, width].", examples=[224, [224, 192]])

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw nothing."""
        return no_params(len(sizes)), sizes_of(len(sizes), pair(self.size))

    def beside(self, scale: Scale, channels: int) -> Window:
        """Return windows of the scaled size."""
        return Window(size=scale.pair(self.size))

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Carry the window that torchvision cuts, which it rounds half to even; padding is cut off at the right."""
        left_over = before - after
        corners = np.where(left_over < 0, -(-left_over // 2), np.rint(left_over / 2).astype(np.int64))
        return _carried(corners, self.size, before, others, scale)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop the centre."""
        return cast(Tensor, kernels().center_crop(images, list(pair(self.size))))

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take images of any size."""
        return True

    apply_in_batches = apply


class RandomCrop(AugmentationBase):
    """Pad every side, then crop at a random position."""

    columns: ClassVar[tuple[str, ...]] = ("top", "left")

    kind: Literal["random_crop"] = "random_crop"
    size: Size = Field(description="Side of the window in pixels, or [height, width].", examples=[32, [32, 28]])
    padding: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Pixels added to every side before the crop."
    )
    padding_mode: PaddingMode = Field(
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

    def beside(self, scale: Scale, channels: int) -> Window:
        """Return windows of the scaled size."""
        return Window(size=scale.pair(self.size), padding_mode=self.padding_mode, fill=self.fill)

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Carry the windows."""
        return _carried(params - self.padding, self.size, before, others, scale)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Pad and crop."""
        widths = ((0, 0), (0, 0), (self.padding, self.padding), (self.padding, self.padding))
        return windows(padded(images, widths, self), params, pair(self.size))

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take images of any size."""
        return True

    def apply_in_batches(self, images: Tensor, params: Ints) -> Tensor:
        """Gather the pixels of each window; those of the padding are other pixels, or `fill`."""
        corners, places, inside = to_device(torch.from_numpy(params), images.device), [], []
        for axis, (length, side) in enumerate(zip(pair(self.size), images.shape[2:], strict=True)):
            at = corners[:, axis, None] + (torch.arange(length, device=images.device) - self.padding)
            inside.append((at >= 0) & (at < side))
            places.append(self._padded(at, side))
        rows = torch.arange(len(images), device=images.device)[:, None, None]
        found = images.permute(0, 2, 3, 1)[rows, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)
        if self.padding and self.padding_mode == "constant":
            found = torch.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], found, self.fill)
        return found

    def _padded(self, at: Tensor, side: int) -> Tensor:
        """Return which of `side` pixels lie at places before, in and after them."""
        if self.padding_mode in ("constant", "edge"):
            return at.clamp(0, side - 1)
        repeated = int(self.padding_mode == "symmetric")  # the border's own pixels
        before = torch.where(at < 0, -at - repeated, at)
        return torch.where(before >= side, 2 * (side - 1) + repeated - before, before)


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
        description="Arithmetic of the resize. `torchvision` is fast, and its pixels may differ by a few levels "
        "between CPUs; `exact` uses integer weights and gives the same bytes on every machine.",
    )
    ratio_knots: RatioKnots = Field(
        default=(), description="Computed from `ratio`; do not set it yourself.", examples=[[]]
    )

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

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return the same to the scaled size."""
        return self.model_copy(update={"size": scale.pair(self.size)})

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Scale the boxes, each to its image."""
        return rescaled_boxes(params, before, others), scale(after)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Crop and resize with antialiasing."""
        return crop_and_resize(images, params, pair(self.size), self.interpolation, self.kernel)

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take small images, by the exact kernel."""
        return resampled_together(size, pair(self.size), self.kernel)

    apply_in_batches = apply
