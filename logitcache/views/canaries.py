"""Canaries: a few views recorded in stage one and rendered again before a student starts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import ReplayMismatchError
from logitcache.recipe import Component
from logitcache.views.keys import Draws, ViewKey, below
from logitcache.views.spec import Views

NUM_CANARIES = 32
MAX_MEAN_DIFFERENCE = 0.5
MAX_DIFFERENCE = 16
Level = Literal["strict", "numeric", "off"]


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

    @property
    def drift(self) -> bool:
        """Whether only the pixels differ, and by no more than other kernels make them differ."""
        same_inputs = self.raw_equal == self.plans_equal == self.num_canaries
        return same_inputs and self.mean_difference <= MAX_MEAN_DIFFERENCE and self.max_difference <= MAX_DIFFERENCE


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


def pixel_digest(array: NDArray[np.generic]) -> str:
    """Return the sha256 of an array's dtype, shape and bytes, as hex."""
    return hashlib.sha256(
        f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()


def take(views: Views, keys: list[ViewKey]) -> tuple[tuple[Canary, ...], Tensor]:
    """Render canaries: their records and their pixels, uint8 [K, C, H, W]."""
    taken = [_take(views, key) for key in keys]
    return tuple(record for record, _ in taken), views.stack([pixels for _, pixels in taken], keys)


def _take(views: Views, key: ViewKey) -> tuple[Canary, Tensor]:
    raw = views.dataset.read(key.index)
    sizes = np.array([raw.shape[1:]], dtype=np.int64)
    plan = np.concatenate([params[0] for params in views.spec.plan([key], sizes)] or [sizes[0]])
    [pixels] = views.spec.render([raw], [key])
    digests = {
        name: pixel_digest(array)
        for name, array in {"raw": raw.numpy(), "plan": plan, "augmented": pixels.numpy()}.items()
    }
    return Canary(view=key.view, index=key.index, **digests), pixels


def compare(views: Views, recorded: Sequence[Canary], recorded_pixels: Tensor) -> CanaryReport:
    """Render the recorded canaries again and count what is equal."""
    now = [_take(views, ViewKey(canary.view, canary.index)) for canary in recorded]
    pairs = [(record, canary) for (record, _), canary in zip(now, recorded, strict=True)]
    differences = [_difference(pixels, then) for (_, pixels), then in zip(now, recorded_pixels, strict=True)]
    return CanaryReport(
        num_canaries=len(recorded),
        raw_equal=sum(a.raw == b.raw for a, b in pairs),
        plans_equal=sum(a.plan == b.plan for a, b in pairs),
        augmented_equal=sum(a.augmented == b.augmented for a, b in pairs),
        mean_difference=float(np.mean([one.double().mean().item() for one in differences])),
        max_difference=max(int(one.max()) for one in differences),
    )


def _difference(pixels: Tensor, recorded: Tensor) -> Tensor:
    """Return how far pixels are apart in levels; images of different shapes could not be further."""
    if pixels.shape != recorded.shape:
        return torch.tensor([255])
    return (pixels.int() - recorded.int()).abs()


def judge(report: CanaryReport, level: Level, what: str) -> str | None:
    """Return a warning for a drift that `level` accepts, None where all is equal; else raise ReplayMismatchError."""
    if report.equal:
        return None
    message = (
        f"augmented images differ from those the teacher saw ({what})\n"
        f"  raw images {report.raw_equal}/{report.num_canaries} equal | "
        f"plans {report.plans_equal}/{report.num_canaries} equal | "
        f"augmented {report.augmented_equal}/{report.num_canaries} equal: "
        f"mean |d| {report.mean_difference:.2f}, max {report.max_difference}\n  -> {_diagnosis(report)}"
    )
    if level == "numeric" and report.drift:
        return message
    raise ReplayMismatchError(message)


def _diagnosis(report: CanaryReport) -> str:
    if report.drift:
        limits = f"(limits {MAX_MEAN_DIFFERENCE} / {MAX_DIFFERENCE})"
        return (
            f"numeric drift {limits}: same crops, different kernels. Accept with --verify numeric, "
            "or precompute again on this machine."
        )
    if report.raw_equal < report.num_canaries:
        return (
            "the decoded images differ: other files, another order or another decoder. "
            "Point `dataset` at the images of the cache."
        )
    if report.plans_equal < report.num_canaries:
        return "the plans differ: another seed, other augmentations or damaged records. Precompute again."
    return (
        "same images and crops, but other pixels: another resize kernel or version. "
        "Install the recorded versions, or precompute again."
    )
