"""Canaries: a few views recorded in stage one and rendered again before a student starts."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from logitcache.config.recipe import Component, Lenient
from logitcache.errors import RecipeError, ReplayMismatchError
from logitcache.views.augmentations.foreign import foreign_transforms
from logitcache.views.keys import Draws, Ints, ViewKey, below
from logitcache.views.spec import Views

NUM_CANARIES = 32
Level = Literal["strict", "numeric", "off"]
"""strict refuses any other pixel, numeric warns of a drift within limits and refuses more, off accepts everything."""


class DriftLimits(Component):
    """Differences of the canaries' pixels that `verify: numeric` accepts, in levels of 255.

    The defaults lie between the effect of another CPU or release on a resize (mean below 0.25, at most 9 levels) and
    that of another kernel (mean above 1, 19 levels or more).
    """

    mean: Annotated[float, Field(ge=0.0, le=255.0), Lenient] = Field(
        default=0.5, description="Largest mean difference of a canary's pixels, in levels of 255."
    )
    max: Annotated[int, Field(ge=0, le=255)] = Field(
        default=16, description="Largest difference of a single pixel, in levels of 255."
    )

    def __str__(self) -> str:
        return f"limits {self.mean:g} / {self.max}"


DEFAULT_LIMITS = DriftLimits()


class Canary(Component):
    """What one view was: sha256 of its decoded image, of its plan and of its pixels."""

    view: int
    index: int
    raw: str
    plan: str
    augmented: str


@dataclass(frozen=True)
class CanaryReport:
    """How many canaries are equal, and how far the pixels are apart, in levels of 255."""

    num_canaries: int
    raw_equal: int
    plans_equal: int
    augmented_equal: int
    mean_difference: float
    max_difference: int

    @property
    def equal(self) -> bool:
        """Whether every canary is what it was."""
        return self.raw_equal == self.plans_equal == self.augmented_equal == self.num_canaries

    def is_drift(self, limits: DriftLimits) -> bool:
        """Whether only the pixels differ, and by no more than the limits allow."""
        same_inputs = self.raw_equal == self.plans_equal == self.num_canaries
        return same_inputs and self.mean_difference <= limits.mean and self.max_difference <= limits.max


class Origin(NamedTuple):
    """The cache that recorded the canaries, and the versions there and here."""

    name: str
    recorded: Mapping[str, str]
    here: Mapping[str, str]
    has_parameters: bool = False
    whose: str = "those the teacher saw"


def choose(seed: int, num_images: int, num_views: int) -> list[ViewKey]:
    """Choose up to 32 different keys from all over the views, sorted."""
    if num_images * num_views <= NUM_CANARIES:
        return [ViewKey(view, index) for view in range(num_views) for index in range(num_images)]
    chosen: set[ViewKey] = set()
    tries = np.arange(64 * NUM_CANARIES, dtype=np.uint64)
    words = Draws(seed, np.zeros_like(tries), tries).words("canary", 0, 3)
    wide = words[:, 0] << np.uint64(32) | words[:, 1]
    for view, index in zip(
        below(words[:, 2], num_views).tolist(), (wide % np.uint64(num_images)).tolist(), strict=True
    ):
        if len(chosen) < NUM_CANARIES:
            chosen.add(ViewKey(view, index))
    return sorted(chosen)


def array_digest(array: NDArray[np.generic]) -> str:
    """Return the sha256 of an array's dtype, shape and bytes, as hex."""
    return hashlib.sha256(
        f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()


def take(views: Views, keys: list[ViewKey]) -> tuple[tuple[Canary, ...], Tensor]:
    """Render canaries: their records and their pixels, uint8 [K, C, H, W].

    Raises RecipeError if they come out different when they are rendered again, together and in another order.
    """
    pixels, (*others, last) = views.__getitems__(keys), keys
    again = [views[last], *(views.__getitems__(others[::-1]) if others else ())]
    if not torch.equal(torch.stack(again), pixels.flip(0)):
        names = [used.what for used in foreign_transforms(views.spec.augmentations)]
        raise RecipeError(
            f"views come out different when they are rendered again. Fix: what draws in {', '.join(names)} must do so "
            "from the global generators of torch, numpy or Python, and keep nothing from one image to the next"
        )
    return tuple(_records(views, keys, _raw(views, keys), pixels.unbind())), pixels


def _raw(views: Views, keys: Sequence[ViewKey]) -> list[Tensor]:
    return [views.images.read(key.index) for key in keys]


def _sizes(raw: Sequence[Tensor]) -> Ints:
    return np.array([image.shape[1:] for image in raw], dtype=np.int64)


def _are_alike(views: Views, keys: Sequence[ViewKey], raw: Sequence[Tensor]) -> bool:
    """Whether the views of images, which may be others than stage one saw, are sure to have one shape."""
    if views.recorded is not None or len({len(image) for image in raw}) > 1:
        return False
    rendered = views.planned_sizes(keys, _sizes(raw))
    return bool((rendered == rendered[0]).all())


def _records(
    views: Views, keys: Sequence[ViewKey], raw: Sequence[Tensor], pixels: Sequence[Tensor]
) -> Iterator[Canary]:
    """Record views by the pixels of their images and their own."""
    sizes = _sizes(raw)
    if not views.spec.mixing or _are_alike(views, keys, raw):
        drawn = views.rows(keys, sizes)
    else:
        drawn = np.concatenate([views.rows([key], size[None]) for key, size in zip(keys, sizes, strict=True)])
    for key, image, view, row, size in zip(keys, raw, pixels, drawn, sizes, strict=True):
        yield Canary(
            view=key.view,
            index=key.index,
            raw=array_digest(image.numpy()),
            plan=array_digest(row if row.size else size),
            augmented=array_digest(view.numpy()),
        )


def compare(views: Views, recorded: Sequence[Canary], recorded_pixels: Tensor) -> CanaryReport:
    """Render the recorded canaries again and count what is equal."""
    keys = [ViewKey(canary.view, canary.index) for canary in recorded]
    raw = _raw(views, keys)
    rendered = views.__getitems__(keys).unbind() if _are_alike(views, keys, raw) else [views[key] for key in keys]
    pairs = list(zip(_records(views, keys, raw, rendered), recorded, strict=True))
    # Images of different shapes could not be further apart.
    differences = [
        (pixels.int() - then.int()).abs() if pixels.shape == then.shape else torch.tensor([255])
        for pixels, then in zip(rendered, recorded_pixels, strict=True)
    ]
    return CanaryReport(
        num_canaries=len(recorded),
        raw_equal=sum(a.raw == b.raw for a, b in pairs),
        plans_equal=sum(a.plan == b.plan for a, b in pairs),
        augmented_equal=sum(a.augmented == b.augmented for a, b in pairs),
        mean_difference=float(np.mean([one.double().mean().item() for one in differences])),
        max_difference=max(int(one.max()) for one in differences),
    )


def judge(report: CanaryReport, level: Level, origin: Origin, limits: DriftLimits = DEFAULT_LIMITS) -> str | None:
    """Return a warning for a drift that `level` accepts, None if all is equal; else raise ReplayMismatchError."""
    if report.equal or level == "off":
        return None
    accepted, total = level == "numeric" and report.is_drift(limits), report.num_canaries
    verdict, fix = _diagnosis(report, limits, origin.has_parameters)
    # What differs on both sides; if nothing does, what decides pixels most.
    names = dict.fromkeys([*origin.recorded, *origin.here])
    shown = [name for name in names if origin.recorded.get(name) != origin.here.get(name)] or ["torch", "cpu"]
    recorded, here = (
        ", ".join(f"{name} {side.get(name, 'none')}" for name in shown) for side in (origin.recorded, origin.here)
    )
    message = (
        f"augmented images differ from {origin.whose} ({origin.name})\n"
        f"  raw images {report.raw_equal}/{total} equal | plans {report.plans_equal}/{total} equal | "
        f"augmented {report.augmented_equal}/{total} equal: "
        f"mean |d| {report.mean_difference:.2f}, max {report.max_difference}\n"
        f"  -> {verdict}\n"
        f"  recorded: {recorded}      here: {here}\n"
        f"  {'Accepted, as verify is numeric.' if accepted else f'Fix: {fix}'}"
    )
    if accepted:
        return message
    raise ReplayMismatchError(message)


def _diagnosis(report: CanaryReport, limits: DriftLimits, has_parameters: bool) -> tuple[str, str]:
    """Return the verdict and the fix."""
    if report.is_drift(limits):
        return (
            f"numeric drift ({limits}): same crops, different kernels.",
            "accept with --verify numeric, or precompute again on this machine.",
        )
    if report.raw_equal < report.num_canaries:
        return (
            "the decoded images differ: other files, another order or another decoder.",
            "point `dataset` at the images that were recorded.",
        )
    if report.plans_equal < report.num_canaries:
        recorded = "replay the parameters that this cache keeps (replay: recorded), or " if has_parameters else ""
        return (
            "the plans differ: another seed, other augmentations or another release of logitcache.",
            f"{recorded}install the recorded versions, or precompute again.",
        )
    return (
        f"more than numeric drift ({limits}): same images and crops, but another resize kernel or version.",
        "install the recorded versions, or precompute again.",
    )
