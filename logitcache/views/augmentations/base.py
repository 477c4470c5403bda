"""What augmentations share: the class, types of fields, and changes of single images of a batch.

An augmentation plans, then applies. Semantics are those of the torchvision v2 transform of the same name. Plans use
integers and exact float64 arithmetic only, no exp, log or pow, whose bytes differ between numpy releases.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from logitcache.config.recipe import NEVER_APPLIED, Component, Float
from logitcache.errors import DataError, RecipeError
from logitcache.views.keys import Draws, Ints, Words, uniform

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Side = Annotated[int, Field(ge=1, le=16_384)]
Size = Side | tuple[Side, Side]
"""A side, or height and width."""
Fill = Annotated[int, Field(ge=0, le=255)]

NUM_KNOTS = 65


class Scale(NamedTuple):
    """The (height, width) of views of paired images, `shown`, and of the teacher's views, `seen`."""

    seen: tuple[int, int]
    shown: tuple[int, int]

    def __call__(self, sizes: Ints) -> Ints:
        """Scale sizes [..., 2] of the teacher's images, to one pixel or more."""
        return np.maximum(rescaled(sizes, np.array(self.seen), np.array(self.shown)), 1)

    def pair(self, size: "Size") -> tuple[int, int]:
        """Scale a side, or height and width."""
        height, width = self(np.array(pair(size))).tolist()
        return height, width


def rescaled(places: Ints, before: Ints, after: Ints) -> Ints:
    """Carry places in lengths `before` to lengths `after`, rounded half up; by integers alone."""
    return np.asarray((2 * places * after + before) // (2 * before), np.int64)


def rescaled_boxes(boxes: Ints, before: Ints, after: Ints) -> Ints:
    """Carry boxes [B, 4] (top, left, height, width) in images of sizes `before` [B, 2] to sizes `after`.

    A box keeps a pixel of each side that it has.
    """
    starts, stops = rescaled(boxes[:, :2], before, after), rescaled(boxes[:, :2] + boxes[:, 2:], before, after)
    lost = (boxes[:, 2:] > 0) & (stops == starts)
    starts = np.where(lost, np.minimum(starts, after - 1), starts)
    return np.concatenate([starts, np.where(lost, 1, stops - starts)], axis=1)


class Step(NamedTuple):
    """An augmentation of images of sizes `before` [B, 2], with its parameters [B, P], and their sizes `after` it."""

    augmentation: "AugmentationBase"
    params: Ints
    before: Ints
    after: Ints


class AugmentationBase(Component, ABC):
    """An entry of `augmentations`: integer parameters planned from keys, applied to uint8 pixels.

    A subclass names its parameters in the class variable `columns`; by default it has none.
    """

    scale_free: ClassVar[bool] = False
    """Whether it does the same to an image in any resolution: its parameters and its result count no pixels."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the parameters of an image, [P]."""
        return ()

    @property
    def is_random(self) -> bool:
        """Whether its parameters differ from view to view."""
        return bool(self.columns)

    def idle(self, epochs: float) -> str | None:
        """Return why the augmentation is never applied."""
        return NEVER_APPLIED if dict(self).get("p") == 0 else None

    @abstractmethod
    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw the parameters, int64 [B, P], of images of `sizes` [B, 2] (height, width); also return the new sizes.

        `ordinal` counts the augmentations of this kind before this one.
        """

    @abstractmethod
    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Change images of one size, uint8 [B, C, H, W], by their parameters."""

    def beside(self, scale: Scale, channels: int) -> "AugmentationBase | None":
        """Return the augmentation of paired images, of so many channels; None for a change of colour.

        Raises RecipeError if its geometry cannot be shared.
        """
        raise RecipeError(
            f"{dict(self)['kind']} runs a transform whose geometry paired images cannot share: only its code knows "
            "what it draws. Fix: precompute with other augmentations"
        )

    def carried(self, params: Ints, before: Ints, after: Ints, others: Ints, scale: Scale) -> tuple[Ints, Ints]:
        """Return the parameters of `beside` for paired images of sizes `others` [B, 2], and their new sizes.

        `params` are those of the teacher's images, whose sizes [B, 2] they change from `before` to `after`.
        """
        return params, others

    def in_batches(self, size: tuple[int, int]) -> bool:
        """Return whether `apply_in_batches` takes images of (height, width)."""
        return False

    def apply_in_batches(self, images: Tensor, params: Ints) -> Tensor:
        """Return the bytes of `apply`, by operations on a whole batch, on the device of the images."""
        raise NotImplementedError


@functools.cache
def kernels() -> ModuleType:
    """Import torchvision's kernels when they are first needed: torchvision imports torch's compiler, for seconds."""
    return import_module("torchvision.transforms.v2.functional")


class TorchvisionBase(AugmentationBase):
    """An augmentation by torchvision's kernels, imported when it is made: before there are workers to import them."""

    def model_post_init(self, context: object) -> None:
        """Import the kernels."""
        kernels()


class ResizingBase(TorchvisionBase):
    """An augmentation that brings a part of an image, or all of it, to a size of its own."""

    @abstractmethod
    def smallest(self, sizes: Ints) -> Ints:
        """Return height and width that no part falls below that can be drawn of images of `sizes`, [B, 2] both."""

    @abstractmethod
    def results(self, sizes: Ints) -> Ints:
        """Return the sizes of the results for images of `sizes`, [B, 2] both."""


def boxes_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels [B, 1, H, W] lie in boxes [B, 4] (top, left, height, width)."""
    within = []
    for axis, side in enumerate((height, width)):
        places, start = torch.arange(side, device=boxes.device), boxes[:, axis, None]
        within.append((places >= start) & (places < start + boxes[:, axis + 2, None]))
    return within[0][:, None, :, None] & within[1][:, None, None, :]


def pair(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


def sizes_of(count: int, size: tuple[int, ...]) -> Ints:
    """Return one size for `count` images, [B, 2]; other rows of integers likewise."""
    return np.tile(np.array(size, dtype=np.int64), (count, 1))


def no_params(count: int) -> Ints:
    """Return the parameters of what draws nothing, [B, 0]."""
    return np.empty((count, 0), dtype=np.int64)


def ratio_table(ratio: tuple[float, float], given: tuple[float, ...]) -> tuple[float, ...]:
    """Tabulate exp over the logs of `ratio`, linear in between: log-uniform ratios without exp at replay.

    The relative error is below 2e-5 for ratios up to 4/3 apart. Raises ValueError for a given table of other ratios.
    """
    start, stop = (math.log(value) for value in ratio)
    exact = (math.exp(start + (stop - start) * k / (NUM_KNOTS - 1)) for k in range(NUM_KNOTS))
    table = tuple(float(f"{value:.12g}") for value in exact)  # the last digits of exp depend on the C library
    if given and (len(given) != NUM_KNOTS or any(abs(a - b) > 1e-9 * b for a, b in zip(given, table, strict=True))):
        raise ValueError("the table does not belong to `ratio`: leave it out, it is computed")
    return given or table


def _in_order(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"the smaller number comes first: [{limits[1]}, {limits[0]}]")
    return limits


Ordered = AfterValidator(_in_order)
"""Goes with a pair of limits."""


def _tabulated(given: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
    return ratio_table(info.data["ratio"], given) if "ratio" in info.data else given


RatioKnots = Annotated[tuple[Float, ...], AfterValidator(_tabulated), Field(validate_default=True)]
"""exp over the range of a component's log `ratio`, linear in between: a part of its stored form, so that no replay
computes exp. The relative error is below 2e-5 for [3/4, 4/3], below 2e-4 for [0.3, 3.3]."""


def drawn_sides(words: Words, area: NDArray[np.float64], knots: tuple[float, ...]) -> tuple[Ints, Ints]:
    """Draw aspect ratios from a table by words; return √(area · ratio) and √(area / ratio), rounded."""
    ratios = look_up(knots, uniform(words))
    return np.rint(np.sqrt(area * ratios)).astype(np.int64), np.rint(np.sqrt(area / ratios)).astype(np.int64)


def look_up(table: tuple[float, ...], where: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate a ratio table at places in [0, 1)."""
    knots = np.array(table)
    place = where * (NUM_KNOTS - 1)
    knot = place.astype(np.int64)
    return np.asarray(knots[knot] + (knots[knot + 1] - knots[knot]) * (place - knot), np.float64)


def replace_rows(images: Tensor, rows: Iterable[int], change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Copy `images` [B, C, H, W] with `change(row, image)` in place of each of `rows`; without rows, copy nothing."""
    changed = {row: change(row, images[row]) for row in rows}
    if not changed:
        return images
    result = images.clone()
    for row, image in changed.items():
        result[row] = image
    return result


def require_colors(kind: str, images: Tensor) -> None:
    """Raise DataError unless the images have one channel or three, all that torchvision's color kernels take."""
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"{kind} takes images of 1 channel (grey) or 3 (RGB), these have {images.shape[1]}. "
            f"Fix: read them as RGB or L, or leave {kind} out of views.augmentations"
        )


def require_values(field: str, values: tuple[int, ...], images: Tensor) -> None:
    """Raise DataError unless there is one value, or one for each channel."""
    if len(values) not in (1, images.shape[1]):
        raise DataError(
            f"{field} has {len(values)} values {list(values)}, the images have {images.shape[1]} channels. "
            "Fix: give one number, or a list of one for each channel"
        )


def levels_of(values: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Return levels for images of so many channels: their mean if they are of another number."""
    return values if len(values) in (1, channels) else (round(sum(values) / len(values)),)
