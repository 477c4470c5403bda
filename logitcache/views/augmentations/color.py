"""Colors: brightness, contrast, saturation and hue in random order; sometimes grey."""

import itertools
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from logitcache.config.recipe import Float, Fraction
from logitcache.views.augmentations.base import Scale, TorchvisionBase, kernels, replace_rows, require_colors
from logitcache.views.keys import Draws, Ints, below, bernoulli, uniform

Factors = Float | tuple[Float, Float]
"""How far a factor may be from its neutral value, or its lowest and highest value."""

STEPS = 4096
"""Factors are multiples of 1 / STEPS. A power of two, so that a factor below 16 times a level is exact in the float32
arithmetic of torchvision's kernels: such a product is the same with and without fused multiplication."""
LARGEST_FACTOR = 2.0**20
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)


def limits_of(factors: Factors | None, neutral: float) -> tuple[float, float]:
    """Return the lowest and the highest factor; a single number does not go below zero if 1 is neutral."""
    if factors is None:
        return neutral, neutral
    if isinstance(factors, tuple):
        return factors
    return (max(1.0 - factors, 0.0), 1.0 + factors) if neutral else (-factors, factors)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Blend an image [C, H, W] with its mean grey, as torchvision does.

    The mean is of an exact sum. torchvision's float32 sum is rounded above 2²⁴, which a large image exceeds, in an
    order that depends on the number of threads.
    """
    grey = kernels().rgb_to_grayscale_image(image) if len(image) == 3 else image
    mean = torch.tensor(int(grey.sum()) / grey.numel(), dtype=torch.float32)
    return image.mul(factor).add_(mean, alpha=1.0 - factor).clamp_(0, 255).to(torch.uint8)


ADJUSTMENTS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image, factor: kernels().adjust_brightness_image(image, factor),
    adjust_contrast,
    lambda image, factor: kernels().adjust_saturation_image(image, factor),
    lambda image, factor: kernels().adjust_hue_image(image, factor),
)


class ColorJitter(TorchvisionBase):
    """Change brightness, contrast, saturation and hue in random order.

    A number x means factors in [max(0, 1 - x), 1 + x] (hue: [-x, x]); [lowest, highest] gives the range itself. Omitted
    properties do not change. Factors are drawn in steps of 2⁻¹². Images have one channel or three.
    """

    columns: ClassVar[tuple[str, ...]] = (
        *("applied", "first", "second", "third", "fourth"),
        *("brightness", "contrast", "saturation", "hue"),
    )
    scale_free: ClassVar[bool] = True

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: Factors | None = Field(
        default=None,
        description="Range of the factor that multiplies each level; by default brightness does not change.",
        examples=[0.4, [0.8, 1.2]],
    )
    contrast: Factors | None = Field(
        default=None,
        description="Range of the factor of each level's distance from the mean grey; by default contrast does not "
        "change.",
        examples=[0.4, [0.8, 1.2]],
    )
    saturation: Factors | None = Field(
        default=None,
        description="Range of the factor of each pixel's distance from its grey; by default saturation does not "
        "change.",
        examples=[0.4, [0.8, 1.2]],
    )
    hue: Factors | None = Field(
        default=None,
        description="Range of the shift of the hue, in turns of the colour circle from -0.5 to 0.5; by default hue "
        "does not change.",
        examples=[0.1, [-0.05, 0.05]],
    )
    p: Fraction = Field(default=1.0, description="Probability that an image is changed at all.")

    @field_validator("brightness", "contrast", "saturation", "hue")
    @classmethod
    def _possible(cls, factors: Factors | None, info: ValidationInfo) -> Factors | None:
        lowest, highest = (-0.5, 0.5) if info.field_name == "hue" else (0.0, LARGEST_FACTOR)
        if isinstance(factors, float | int) and factors < 0:
            raise ValueError("a single number is how far from neutral, and cannot be negative")
        low, high = limits_of(factors, 0.0 if info.field_name == "hue" else 1.0)
        if not lowest <= low <= high <= highest:
            raise ValueError(
                f"factors go from {lowest:g} to {highest:g}, the lower one first; these are [{low}, {high}]"
            )
        return factors

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is ever changed."""
        if not any(self._changed()):
            return "changes nothing. Fix: give it brightness, contrast, saturation or hue, or leave it out"
        return super().idle(epochs)

    def _changed(self) -> list[bool]:
        """Return which of brightness, contrast, saturation and hue have a factor that is not neutral, [4]."""
        return [limits != (neutral, neutral) for limits, neutral in zip(self.limits(), NEUTRAL, strict=True)]

    def limits(self) -> list[tuple[float, float]]:
        """Return the lowest and highest factor of brightness, contrast, saturation and hue, [4]."""
        factors = (self.brightness, self.contrast, self.saturation, self.hue)
        return list(map(limits_of, factors, NEUTRAL))

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw whether to apply, the order of the four, and their factors in multiples of 1 / STEPS."""
        words = draws.words("jitter", ordinal, 6)
        chosen = bernoulli(words[:, :1], self.p).astype(np.int64)
        order = ORDERS[below(words[:, 1], len(ORDERS))]
        low, high = np.array(self.limits()).T
        factors = np.rint((low + (high - low) * uniform(words[:, 2:])) * STEPS).astype(np.int64)
        return np.concatenate([chosen, order, factors], axis=1), sizes

    def beside(self, scale: Scale, channels: int) -> None:
        """Return None: it moves no pixel."""

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Adjust the chosen images."""
        require_colors(self.kind, images)
        applied = self._changed()

        def adjust(row: int, image: Tensor) -> Tensor:
            order, factors = params[row, 1:5].tolist(), params[row, 5:].tolist()
            for which in order:
                if applied[which]:
                    image = ADJUSTMENTS[which](image, factors[which] / STEPS)
            return image

        return replace_rows(images, np.flatnonzero(params[:, 0]).tolist(), adjust)


class RandomGrayscale(TorchvisionBase):
    """Convert an image to grey; it keeps its number of channels, one or three."""

    columns: ClassVar[tuple[str, ...]] = ("applied",)
    scale_free: ClassVar[bool] = True

    kind: Literal["random_grayscale"] = "random_grayscale"
    p: Fraction = Field(default=0.1, description="Probability that an image is converted to grey.")

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw one bit."""
        return bernoulli(draws.words("grayscale", ordinal, 1), self.p).astype(np.int64), sizes

    def beside(self, scale: Scale, channels: int) -> None:
        """Return None: it moves no pixel."""

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Turn the chosen images to grey."""
        require_colors(self.kind, images)
        if images.shape[1] == 1:
            return images
        return replace_rows(
            images, np.flatnonzero(params[:, 0]).tolist(), lambda row, image: kernels().rgb_to_grayscale_image(image, 3)
        )
