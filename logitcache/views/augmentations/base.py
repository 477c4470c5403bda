"""What augmentations share.

Each has two verbs. `plan` draws the parameters of a batch, int64 [B, P], from the words of the keys and the images'
sizes [B, 2] (height, width), and tells the sizes that result. `apply` gives images of one size, uint8 [B, C, H, W],
their parameters. Semantics are those of the torchvision v2 transform of the same name. Plans use integers and exact
float64 arithmetic only, no exp, log or pow: their bytes differ between numpy releases.
"""

import math
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationInfo

from logitcache.config.recipe import Float

Ints = NDArray[np.int64]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Side = Annotated[int, Field(ge=1, le=16_384)]
Size = Side | tuple[Side, Side]
"""A side, or height and width."""
Fill = Annotated[int, Field(ge=0, le=255)]

NUM_KNOTS = 65


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
"""The table of a component's `ratio`, a part of its stored form."""


def look_up(table: tuple[float, ...], where: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate a ratio table at places in [0, 1)."""
    knots = np.array(table)
    place = where * (NUM_KNOTS - 1)
    knot = place.astype(np.int64)
    ratios: NDArray[np.float64] = knots[knot] + (knots[knot + 1] - knots[knot]) * (place - knot)
    return ratios
