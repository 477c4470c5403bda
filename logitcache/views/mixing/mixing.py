"""Mixing: each pair of images becomes two mixtures of one another, and the teacher answers the mixtures.

MixUp after Zhang et al., "mixup: Beyond empirical risk minimization" (ICLR 2018); CutMix after Yun et al., "CutMix:
Regularization strategy to train strong classifiers with localizable features" (ICCV 2019). Both images of a pair share
one weight and one box, since their words are those of the smaller index.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from logitcache.config.recipe import NEVER_APPLIED, Component, Fraction, Lenient
from logitcache.runtime.device import to_device
from logitcache.views.augmentations.base import boxes_mask
from logitcache.views.keys import Draws, Ints, Words, below

Pixels = NDArray[np.uint8]

PlanVersion = Literal[1, 2]
LEVELS = 256
SMALLEST_AREA = 30
"""Areas of boxes are drawn down to 2⁻³⁰ of an image, less than a pixel of the largest."""
_CHUNK_BYTES = 1 << 17  # pixels mixed at a time: they stay in a core's cache
_DIGITS = Context(prec=40)
_MAX_ALPHA = 64.0


MIXED_VIEWS_PER_IMAGE = (
    "views_per_image lets several views share the decode of an image, but with mixing each view brings another partner "
    "to decode. Fix: views_per_image: 1; partners share decodes already"
)

MIXED_IMAGES_HELD_OUT = (
    "images that are mixed are partners of one another, held out or not: students would learn from pixels of images "
    "that are held out. Fix: leave out validation.split, and validate on other images"
)


@functools.cache
def beta_thresholds(alpha: float) -> tuple[int, ...]:
    """Return the words, of 2³², below which a Beta(alpha, alpha) draw rounds to 0/256, to at most 1/256, and so on.

    The regularised incomplete beta function by its power series at 0 (DLMF 8.17.7 and 8.17.22), mirrored about one
    half; in decimal arithmetic, which is the same on every machine. [256], ascending.
    """
    first = _words_below(alpha, [Decimal(2 * level + 1) / (2 * LEVELS) for level in range(LEVELS // 2)])
    return (*first, *(2**32 - value for value in reversed(first)))


def _words_below(alpha: float, values: Sequence[Decimal]) -> list[int]:
    """Return below which word, of 2³², a Beta(alpha, alpha) draw is smaller than each value, at most one half."""
    with localcontext(_DIGITS):
        half = 2 * _incomplete_beta(Decimal(1) / 2, Decimal(alpha))
        return [int(_incomplete_beta(value, Decimal(alpha)) / half * 2**32) for value in values]


@functools.cache
def _areas(alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tabulate Beta(alpha, alpha): areas from 0 to 1, and below which words, of 2³², a draw is smaller; ascending.

    The middles between 256ths and, below the first, powers of two: for alpha < 1 much of the mass is there.
    """
    powers = [Decimal(1) / 2**exponent for exponent in range(SMALLEST_AREA, 9, -1)]
    small = _words_below(alpha, powers)
    middles = [(2 * level + 1) / (2 * LEVELS) for level in range(LEVELS)]
    areas = np.array([0.0, *map(float, powers), *middles, 1.0])
    return areas, np.array([0.0, *small, *beta_thresholds(alpha), 2.0**32])


def _drawn_areas(alpha: float, words: Words) -> NDArray[np.float64]:
    """Draw from Beta(alpha, alpha), linear between tabulated areas, by `+ - * /` alone: the same bits on any CPU."""
    areas, limits = _areas(alpha)
    values = words.astype(np.float64)
    above = np.searchsorted(limits, values, side="right")
    share = (values - limits[above - 1]) / (limits[above] - limits[above - 1])
    return np.asarray(areas[above - 1] + (areas[above] - areas[above - 1]) * share, np.float64)


def _incomplete_beta(x: Decimal, alpha: Decimal) -> Decimal:
    """Return the integral of (t (1 - t))^(alpha - 1) from 0 to x, for x ≤ 1/2."""
    term, total, number = Decimal(1), 1 / alpha, 0
    while number < alpha or abs(term) > Decimal("1e-30"):
        number += 1
        term *= x * (number - alpha) / number
        total += term / (alpha + number)
    return x**alpha * total


COLUMNS = ("partner", "own", "total", "top", "left", "height", "width")
"""What `Mixture.rows` holds."""


class Mixture(NamedTuple):
    """How each image [B] is mixed: with whom, and with what.

    The own label weighs `own` / `total`, the partner's the rest; `boxes` [B, 4] (top, left, height, width) come from
    the partner; if a box is empty, pixels are mixed by `own` of `total` = 256.
    """

    partners: Ints
    own: Ints
    total: Ints
    boxes: Ints

    @property
    def share(self) -> NDArray[np.float64]:
        """The weight of the own label, [B]."""
        return np.asarray(self.own / self.total, np.float64)

    def rows(self) -> Ints:
        """Return one row of integers per image, [B, 7]."""
        return np.column_stack([self.partners, self.own, self.total, self.boxes])

    @classmethod
    def of_rows(cls, rows: Ints) -> "Mixture":
        """Take back what `rows` gave."""
        return cls(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:])

    def apply_(self, images: Tensor, pool: Tensor, places: Ints) -> Tensor:
        """Mix images [B, C, H, W] in place, each with its partner, which is `pool[places]`; all are uint8."""
        cut = self.boxes[:, 2:].any(axis=1)
        for row in np.flatnonzero(cut).tolist():
            top, left, height, width = self.boxes[row].tolist()
            window = (slice(None), slice(top, top + height), slice(left, left + width))
            images[row][window] = pool[int(places[row])][window]
        blended = np.flatnonzero(~cut & (self.own < self.total))
        mixed, others = images.numpy(), pool.numpy()
        size = max(1, _CHUNK_BYTES // images[0].numel())
        for start in range(0, len(blended), size):
            rows = blended[start : start + size]
            here, there = _places(rows), _places(places[rows])
            mixed[here] = _blend(mixed[here], others[there], self.own[rows])
        return images

    def apply_in_batches(self, images: Tensor, pool: Tensor, places: Ints) -> Tensor:
        """Return what `apply_` gives, by operations on the whole batch, on the device of the images."""
        device = images.device
        partners = pool[to_device(torch.from_numpy(places), device)]
        boxes = to_device(torch.from_numpy(self.boxes), device)
        is_blended = (self.own < self.total) & ~self.boxes[:, 2:].any(axis=1)
        weights = to_device(torch.from_numpy(np.where(is_blended, self.own, LEVELS)), device)[:, None, None, None]
        blended = (images.int() * weights + partners.int() * (LEVELS - weights) + LEVELS // 2) >> 8
        return torch.where(boxes_mask(boxes, images.shape[2], images.shape[3]), partners, blended.to(torch.uint8))


def _places(rows: Ints) -> Ints | slice:
    """Index rows without a copy if there is one."""
    return slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows


def _blend(images: Pixels, partners: Pixels, weights: Ints) -> Pixels:
    """Compute (a w + b (256 - w) + 128) >> 8 in 16 bits, whose wrapping cancels: the result has room."""
    a, b = images.astype(np.uint16), partners.astype(np.uint16)
    a -= b
    a *= weights.astype(np.uint16)[:, None, None, None]
    b <<= 8
    a += b
    a += 128
    a >>= 8
    return a.astype(np.uint8)


def _tabulated(given: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if "alpha" not in info.data:
        return given
    table = beta_thresholds(info.data["alpha"])
    if given not in ((), table):
        raise ValueError("the table does not belong to `alpha`: leave it out, it is computed")
    return table


Thresholds = Annotated[tuple[int, ...], AfterValidator(_tabulated), Field(validate_default=True)]


class MixingBase(Component, ABC):
    """A way to mix a pair, by a weight drawn from Beta(alpha, alpha); taken with probability `p`.

    `thresholds` tabulates the distribution; it is part of the stored form, so that no replay computes it.
    """

    kind: str
    alpha: Annotated[float, Field(gt=0.0, le=_MAX_ALPHA), Lenient] = Field(
        default=1.0,
        description="Parameter of Beta(alpha, alpha), from which the weight of a pair is drawn: 1 is uniform, smaller "
        "values concentrate near 0 and 1.",
    )
    p: Fraction = Field(
        default=1.0,
        description="Probability that a pair is mixed in this way; over all entries of `views.mixing`, at most 1 in "
        "total.",
    )
    thresholds: Thresholds = Field(
        default=(), description="Computed from `alpha`; do not set it yourself.", examples=[[]]
    )

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is ever mixed."""
        return NEVER_APPLIED if self.p == 0 else None

    @abstractmethod
    def draw(self, words: Words, size: tuple[int, int], version: PlanVersion) -> tuple[Ints, Ints, Ints]:
        """Return `own`, `total` and `boxes` for words [B, 3] and images of (height, width)."""


class MixUp(MixingBase):
    """Blend the two images with a weight, rounded to 256ths."""

    kind: Literal["mixup"] = "mixup"

    def draw(self, words: Words, size: tuple[int, int], version: PlanVersion) -> tuple[Ints, Ints, Ints]:
        """Return `own`, `total` and `boxes` for words [B, 3] and images of (height, width)."""
        own = _weights(self.thresholds, words[:, 0])
        return own, np.full_like(own, LEVELS), np.zeros((len(own), 4), dtype=np.int64)


class CutMix(MixingBase):
    """Replace a box by that of the partner; its area before clipping is the share 1 - λ of the image, with λ the
    weight.

    Sides are rounded to pixels. In plan version 1, λ was first rounded to 256ths, so that no box was smaller than a
    256th of the image, and sides were rounded down to even numbers.
    """

    kind: Literal["cutmix"] = "cutmix"

    def draw(self, words: Words, size: tuple[int, int], version: PlanVersion) -> tuple[Ints, Ints, Ints]:
        """Return `own`, `total` and `boxes` for words [B, 3] and images of (height, width)."""
        limits = np.array(size)
        centres, sides = below(words[:, 1:3], limits), self._sides(words[:, 0], limits, version)
        starts = np.maximum(centres - sides // 2, 0)
        stops = np.minimum(centres - sides // 2 + sides, limits)
        area, whole = np.prod(stops - starts, axis=1), np.prod(limits)
        return whole - area, np.full_like(area, whole), np.concatenate([starts, stops - starts], axis=1)

    def _sides(self, words: Words, limits: Ints, version: PlanVersion) -> Ints:
        """Return heights and widths before clipping, [B, 2]."""
        if version == 1:
            halves = 0.5 * np.sqrt((LEVELS - _weights(self.thresholds, words)) / LEVELS)
            return 2 * (halves[:, None] * limits).astype(np.int64)
        return np.asarray(np.rint(np.sqrt(_drawn_areas(self.alpha, words))[:, None] * limits), np.int64)


def _weights(thresholds: Sequence[int], words: Words) -> Ints:
    return np.searchsorted(np.array(thresholds, dtype=np.uint64), words, side="right").astype(np.int64)


Mixing = Annotated[MixUp | CutMix, Field(discriminator="kind")]


def _at_most_one(mixings: tuple[Mixing, ...]) -> tuple[Mixing, ...]:
    total = sum(mixing.p for mixing in mixings)
    if total > 1:
        raise ValueError(f"the probabilities `p` of `mixing` add up to {total:g}, more than 1: lower them")
    return mixings


Mixings = Annotated[
    tuple[Mixing, ...],
    Field(
        max_length=8,
        description="Ways to mix pairs of images, `mixup` or `cutmix` or both; at most one is drawn for a pair, by "
        "their probabilities.",
        examples=[[{"kind": "mixup"}]],
    ),
    AfterValidator(_at_most_one),
]


def newest_plan(mixings: Sequence[Mixing]) -> PlanVersion:
    """Return the version by which new views are drawn: the first, but for what the second changed."""
    return 2 if any(isinstance(mixing, CutMix) for mixing in mixings) else 1


def draw_mixture(
    mixings: Sequence[Mixing], draws: Draws, partners: Ints, size: tuple[int, int], version: PlanVersion
) -> Mixture:
    """Draw the mixture of each image [B] with its partner [B]: at most one of `mixings`, by their probabilities."""
    indices = draws.indices.astype(np.int64)
    words = draws._replace(indices=np.minimum(indices, partners).astype(np.uint64)).words("mix", 0, 4)
    own, total = np.ones_like(partners), np.ones_like(partners)
    boxes = np.zeros((len(partners), 4), dtype=np.int64)
    start = 0.0
    for mixing in mixings:
        stop = start + mixing.p
        first, last = np.uint64(int(start * 2**32)), np.uint64(int(stop * 2**32))
        drawn = (words[:, 0] >= first) & (words[:, 0] < last) & (partners != indices)
        for column, values in zip((own, total, boxes), mixing.draw(words[:, 1:], size, version), strict=True):
            column[drawn] = values[drawn]
        start = stop
    return Mixture(np.where(own < total, partners, indices), own, total, boxes)
