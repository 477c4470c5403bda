"""Policies: operations of random kind, drawn from one table; RandAugment and TrivialAugment Wide.

RandAugment after Cubuk et al. 2020 (arXiv:1909.13719), TrivialAugment after Müller and Hutter 2021
(arXiv:2103.10158), both with the operations and magnitudes of torchvision.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.views.augmentations.base import (
    Fill,
    Scale,
    TorchvisionBase,
    kernels,
    levels_of,
    replace_rows,
    require_colors,
    require_values,
    rescaled,
)
from logitcache.views.augmentations.color import adjust_contrast
from logitcache.views.keys import Draws, Ints, below

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode

Bins = Annotated[
    int, Field(ge=2, le=65536, description="Number of steps into which the range of each operation is divided.")
]
PolicyInterpolation = Annotated[
    Literal["nearest", "bilinear"], Field(description="Interpolation of geometric operations.")
]
PolicyFill = Annotated[
    Fill | Annotated[tuple[Fill, ...], Field(min_length=1)] | None,
    Field(
        description="Level, or one for each channel, of pixels that an operation leaves empty; by default 0, black.",
        examples=[128, [124, 116, 104]],
    ),
]


def overlap(shift: int, length: int) -> tuple[int, int, int]:
    """Return the start of the part of a line that stays inside, its start once shifted, and its length."""
    return max(-shift, 0), max(shift, 0), max(length - abs(shift), 0)


class Warp(NamedTuple):
    """How operations that move pixels interpolate and fill."""

    interpolation: "InterpolationMode"
    fill: list[float] | None

    def shear(self, image: Tensor, x: float, y: float) -> Tensor:
        """Shear by slopes, about the top left corner."""
        degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
        return cast(
            Tensor, kernels().affine_image(image, 0.0, [0, 0], 1.0, degrees, self.interpolation, self.fill, [0, 0])
        )

    def translate(self, image: Tensor, x: float, y: float) -> Tensor:
        """Move by whole pixels, rounded towards zero: a copy, with nothing to interpolate."""
        height, width = image.shape[1:]
        fill = torch.tensor(self.fill or [0.0], dtype=torch.uint8)
        moved = fill[:, None, None].expand(len(image), height, width).clone()
        (top, new_top, rows), (left, new_left, columns) = overlap(int(y), height), overlap(int(x), width)
        moved[:, new_top : new_top + rows, new_left : new_left + columns] = image[
            :, top : top + rows, left : left + columns
        ]
        return moved

    def rotate(self, image: Tensor, degrees: float) -> Tensor:
        """Turn about the centre."""
        return cast(Tensor, kernels().rotate_image(image, degrees, self.interpolation, fill=self.fill))


Operation = Callable[[Tensor, float, Warp], Tensor]
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, magnitude, warp: image,
    "shear_x": lambda image, magnitude, warp: warp.shear(image, magnitude, 0.0),
    "shear_y": lambda image, magnitude, warp: warp.shear(image, 0.0, magnitude),
    "translate_x": lambda image, magnitude, warp: warp.translate(image, magnitude, 0.0),
    "translate_y": lambda image, magnitude, warp: warp.translate(image, 0.0, magnitude),
    "rotate": lambda image, magnitude, warp: warp.rotate(image, magnitude),
    "brightness": lambda image, magnitude, warp: kernels().adjust_brightness_image(image, 1.0 + magnitude),
    "color": lambda image, magnitude, warp: kernels().adjust_saturation_image(image, 1.0 + magnitude),
    "contrast": lambda image, magnitude, warp: adjust_contrast(image, 1.0 + magnitude),
    "sharpness": lambda image, magnitude, warp: kernels().adjust_sharpness_image(image, 1.0 + magnitude),
    "posterize": lambda image, magnitude, warp: kernels().posterize_image(image, int(magnitude)),
    "solarize": lambda image, magnitude, warp: kernels().solarize_image(image, 255.0 * magnitude),
    "auto_contrast": lambda image, magnitude, warp: kernels().autocontrast_image(image),
    "equalize": lambda image, magnitude, warp: kernels().equalize_image(image),
}
"""Operations by name, from an image [C, H, W] and a signed magnitude. Plans hold their numbers: append only."""
NAMES = tuple(OPERATIONS)
MOVING = [NAMES.index(name) for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")]
"""The numbers of the operations that move pixels."""
UNSIGNED = ("posterize", "solarize", "auto_contrast", "equalize", "identity")

MagnitudeRange = tuple[float, float]


def narrow_range(name: str, height: int, width: int) -> MagnitudeRange:
    """Return the magnitudes of the first and last bin in RandAugment, for an image of a size."""
    moves = {"translate_x": 150.0 / 331.0 * width, "translate_y": 150.0 / 331.0 * height}
    stops = {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0} | moves
    return {"posterize": (8.0, 4.0), "solarize": (1.0, 0.0)}.get(name, (0.0, stops.get(name, 0.9)))


def wide_range(name: str, height: int, width: int) -> MagnitudeRange:
    """Return the magnitudes of the first and last bin in TrivialAugment Wide; the size does not matter."""
    stops = {"translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0}
    return {"posterize": (8.0, 2.0), "solarize": (1.0, 0.0)}.get(name, (0.0, stops.get(name, 0.99)))


@lru_cache(maxsize=4096)
def magnitude_of(name: str, bounds: MagnitudeRange, num_bins: int, number: int) -> float:
    """Return the magnitude of a bin, as torchvision computes it in float32."""
    start, stop = bounds
    if name == "posterize":
        return float(
            (8 - torch.arange(num_bins, dtype=torch.float32) / ((num_bins - 1) / (start - stop))).round()[number]
        )
    return float(torch.linspace(start, stop, num_bins, dtype=torch.float32)[number])


def apply_policy(
    policy: "RandAugment | TrivialAugmentWide",
    range_of: Callable[[str, int, int], MagnitudeRange],
    images: Tensor,
    params: Ints,
) -> Tensor:
    """Apply the steps of each row in order, [number of the operation, bin, sign] each.

    Rows of identities alone are not copied.
    """
    require_colors(policy.kind, images)
    levels = (policy.fill,) if isinstance(policy.fill, int) else policy.fill
    if levels is not None:
        require_values(f"{policy.kind}.fill", levels, images)
    from torchvision.transforms import InterpolationMode

    warp = Warp(InterpolationMode(policy.interpolation), None if levels is None else list(map(float, levels)))
    height, width = images.shape[2:]
    steps = params.reshape(len(images), -1, 3)

    def change(row: int, image: Tensor) -> Tensor:
        for number, bin_number, sign in steps[row].tolist():
            name = NAMES[number]
            magnitude = magnitude_of(name, range_of(name, height, width), policy.num_magnitude_bins, bin_number)
            image = OPERATIONS[name](image, magnitude if name in UNSIGNED else sign * magnitude, warp)
        return image

    rows = np.flatnonzero((steps[:, :, 0] != NAMES.index("identity")).any(axis=1))
    return replace_rows(images, rows.tolist(), change)


def fill_for(fill: int | tuple[int, ...] | None, channels: int) -> int | tuple[int, ...] | None:
    """Return a fill that images of so many channels have."""
    return levels_of(fill, channels) if isinstance(fill, tuple) else fill


def moving_steps(params: Ints) -> Ints:
    """Return steps [B, S, 3] of which those that move no pixel are identities."""
    steps = params.reshape(len(params), -1, 3).copy()
    steps[~np.isin(steps[..., 0], MOVING), 0] = NAMES.index("identity")
    return steps


class RandAugment(TorchvisionBase):
    """Apply operations of random kind and sign, all with one magnitude. Images have one channel or three."""

    kind: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=256)] = Field(
        default=2, description="Number of operations applied to each image."
    )
    magnitude: Annotated[int, Field(ge=0)] = Field(
        default=9, description="Magnitude of every operation: the index of a bin, below `num_magnitude_bins`."
    )
    num_magnitude_bins: Bins = 31
    interpolation: PolicyInterpolation = "nearest"
    fill: PolicyFill = None

    @model_validator(mode="after")
    def _has_bin(self) -> Self:
        if self.magnitude >= self.num_magnitude_bins:
            raise ValueError(
                f"magnitude {self.magnitude} is not one of {self.num_magnitude_bins} bins, which count from 0: "
                "lower it, or raise num_magnitude_bins"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the parameters."""
        return tuple(f"{n}.{column}" for n in range(self.num_ops) for column in ("operation", "bin", "sign"))

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw number and sign of each operation; its bin is `magnitude`."""
        words = draws.words("randaugment", ordinal, 2 * self.num_ops).reshape(len(sizes), self.num_ops, 2)
        numbers = below(words[..., 0], len(NAMES))
        params = np.stack([numbers, np.full_like(numbers, self.magnitude), 2 * below(words[..., 1], 2) - 1], axis=2)
        return params.reshape(len(sizes), 3 * self.num_ops), sizes

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return the same with a fill that images of so many channels have."""
        return self.model_copy(update={"fill": fill_for(self.fill, channels)})

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Leave out what moves no pixel; translations are by parts of an image."""
        return moving_steps(params).reshape(params.shape), others

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Apply the operations."""
        return apply_policy(self, narrow_range, images, params)


class TrivialAugmentWide(TorchvisionBase):
    """Apply one operation of random kind, magnitude and sign. Images have one channel or three."""

    columns: ClassVar[tuple[str, ...]] = ("operation", "bin", "sign")

    kind: Literal["trivial_augment_wide"] = "trivial_augment_wide"
    num_magnitude_bins: Bins = 31
    interpolation: PolicyInterpolation = "nearest"
    fill: PolicyFill = None

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw number, bin and sign of the operation."""
        words = draws.words("trivial_augment", ordinal, 3)
        numbers, bins = below(words[:, 0], len(NAMES)), below(words[:, 1], self.num_magnitude_bins)
        return np.stack([numbers, bins, 2 * below(words[:, 2], 2) - 1], axis=1), sizes

    def beside(self, scale: Scale, channels: int) -> Self:
        """Return the same with a fill that images of so many channels have; RecipeError for larger views."""
        if scale.shown[0] > scale.seen[0] or scale.shown[1] > scale.seen[1]:
            raise RecipeError(
                f"{self.kind} moves images by up to 32 pixels of the teacher's views of {scale.seen}, and has no more "
                f"for views of {scale.shown}. Fix: --size '{list(scale.seen)}', or precompute with "
                "rand_augment"
            )
        return self.model_copy(update={"fill": fill_for(self.fill, channels)})

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Leave out what moves no pixel, and scale translations to the nearest bin."""
        (steps,) = moving_steps(params).transpose(1, 0, 2)
        for axis, name in enumerate(("translate_y", "translate_x")):
            moved = steps[:, 0] == NAMES.index(name)
            steps[moved, 1] = rescaled(steps[moved, 1], np.array(scale.seen[axis]), np.array(scale.shown[axis]))
        return steps, others

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Apply the operation."""
        return apply_policy(self, wide_range, images, params)
