"""Resizing, with antialiasing."""

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.recipe import Component
from logitcache.views.augmentations.base import Interpolation, Ints, Size, sizes_of
from logitcache.views.keys import Draws


def resize(image: Tensor, size: list[int], interpolation: Interpolation) -> Tensor:
    """Resize an image [C, H, W] with antialiasing."""
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
            scaled = sizes_of(len(sizes), self.size)
        return scaled, scaled

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Resize with antialiasing."""
        return torch.stack(
            [resize(image, size, self.interpolation) for image, size in zip(images, params.tolist(), strict=True)]
        )
