"""Resizing, with antialiasing."""

from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.config.recipe import Component
from logitcache.views.augmentations.base import Interpolation, Ints, Size, sizes_of
from logitcache.views.augmentations.resampling import resample
from logitcache.views.keys import Draws

Kernel = Literal["torchvision", "exact"]


def resized(images: Tensor, boxes: Ints, size: tuple[int, int], interpolation: Interpolation, kernel: Kernel) -> Tensor:
    """Cut `boxes` [B, 4] (top, left, height, width) out of [B, C, H, W] and resize them to `size`."""
    if kernel == "exact":
        assert interpolation != "nearest"
        return resample(images, boxes, size, interpolation)
    mode, out = InterpolationMode(interpolation), list(size)
    # The kernel itself: dispatching on the type of image takes as long as resizing a small one.
    return torch.stack(
        [
            F.resize_image(image[:, top : top + height, left : left + width], out, mode, antialias=True)
            for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
        ]
    )


def require_weights(kernel: Kernel, info: ValidationInfo) -> Kernel:
    """Raise ValueError for an exact kernel with `nearest`."""
    if kernel == "exact" and info.data.get("interpolation") == "nearest":
        raise ValueError("exact is for bilinear and bicubic; nearest copies pixels: leave kernel out")
    return kernel


class Resize(Component):
    """Resize: an integer is the length of the shorter side, a pair is height and width.

    `kernel`: torchvision is fast, and its pixels may differ by one level between CPUs; exact gives the same bytes on
    every machine.
    """

    kind: Literal["resize"] = "resize"
    size: Size
    interpolation: Interpolation = "bilinear"
    kernel: Kernel = Field(default="torchvision", validate_default=True)

    @field_validator("kernel")
    @classmethod
    def _kernel_has_weights(cls, kernel: Kernel, info: ValidationInfo) -> Kernel:
        return require_weights(kernel, info)

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the parameters."""
        return ("height", "width")

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Compute the new height and width."""
        if isinstance(self.size, int):
            scaled = self.size * sizes // sizes.min(axis=1, keepdims=True)
        else:
            scaled = sizes_of(len(sizes), self.size)
        return scaled, scaled

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Resize with antialiasing."""
        height, width = params[0].tolist()  # equal for all rows: the images have one size
        boxes = sizes_of(len(images), (0, 0, *images.shape[2:]))
        return resized(images, boxes, (height, width), self.interpolation, self.kernel)
