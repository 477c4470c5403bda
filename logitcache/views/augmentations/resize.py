"""Resizing, with antialiasing."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.views.augmentations.base import AugmentationBase, Interpolation, Ints, Size, sizes_of
from logitcache.views.augmentations.resampling import resample
from logitcache.views.keys import Draws


def _with_weights(kernel: str, info: ValidationInfo) -> str:
    """Raise ValueError for an exact kernel with `nearest`."""
    if kernel == "exact" and info.data.get("interpolation") == "nearest":
        raise ValueError("exact is for bilinear and bicubic; nearest copies pixels: leave kernel out")
    return kernel


Kernel = Annotated[Literal["torchvision", "exact"], AfterValidator(_with_weights), Field(validate_default=True)]
"""Of a component with `interpolation` before it. torchvision is fast, and its pixels may differ by one level between
CPUs; exact gives the same bytes on every machine."""


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


class Resize(AugmentationBase):
    """Resize the whole image."""

    columns: ClassVar[tuple[str, ...]] = ("height", "width")

    kind: Literal["resize"] = "resize"
    size: Size = Field(
        description="Length of the shorter side in pixels, or [height, width].", examples=[256, [224, 224]]
    )
    interpolation: Interpolation = Field(default="bilinear", description="Interpolation of the resize.")
    kernel: Kernel = Field(
        default="torchvision",
        description="Arithmetic of the resize. `torchvision` is fast, and its pixels may differ by one level "
        "between CPUs; `exact` uses integer weights and gives the same bytes on every machine.",
    )

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
