"""Mirroring."""

from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from logitcache.config.recipe import Fraction
from logitcache.runtime.device import to_device
from logitcache.views.augmentations.base import AugmentationBase, Scale
from logitcache.views.keys import Draws, Ints, bernoulli


class HorizontalFlip(AugmentationBase):
    """Flip left and right."""

    columns: ClassVar[tuple[str, ...]] = ("flipped",)
    scale_free: ClassVar[bool] = True

    kind: Literal["horizontal_flip"] = "horizontal_flip"
    p: Fraction = Field(default=0.5, description="Probability that an image is mirrored.")

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw one bit."""
        return bernoulli(draws.words("flip", ordinal, 1), self.p).astype(np.int64), sizes

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return itself: paired images are mirrored together."""
        return self

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Mirror if the bit is set."""
        kept = params[:, 0] == 0
        if kept.all():
            return images
        mirrored = images.flip(-1)
        if kept.any():  # numpy copies rows much faster than torch.where chooses between them
            mirrored.numpy()[kept] = images.numpy()[kept]
        return mirrored

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Take images of any size."""
        return True

    def apply_in_batches(self, images: Tensor, params: Ints) -> Tensor:
        """Mirror if the bit is set."""
        flipped = to_device(torch.from_numpy(params[:, 0] != 0), images.device)
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)
