"""Sampling: which images an epoch draws, and how often; a pure function of labels, seed and epoch.

Each kind is a frozen component, added to the union on the last line.
"""

import itertools
from abc import ABC, abstractmethod
from decimal import Context, Decimal, localcontext
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from logitcache.config.recipe import Component, Lenient
from logitcache.errors import RecipeError
from logitcache.views.datasets.base import UNLABELLED, ImageDataset, Labels, is_multi_label
from logitcache.views.keys import Draws, Ints, Words, below
from logitcache.views.order import Drawn, EpochOrder, block_ranks

MIXED_SAMPLING = (
    "sampling by class draws images by their own class, mixing brings each image's partner with it. Fix: leave out one "
    "of the two; cross_entropy takes logit_adjustment under mixing too"
)
_BLOCK = 1 << 16  # draws made at a time: the rounds of Philox take many times their memory
_DIGITS = Context(prec=40)


class EveryImage(Component):
    """Use each image once per epoch."""

    by_class: ClassVar[bool] = False

    kind: Literal["every_image"] = "every_image"

    def require_possible(self, dataset: ImageDataset, mixes: bool) -> None:
        """Accept any data set."""

    def order(self, labels: Labels, seed: int, epoch: int, block: int | None, unit: int) -> tuple[Drawn, Drawn]:
        """Return the images [N] of an epoch in order, and how often each was drawn before in it: never.

        `labels` are those of the images to draw from.
        """
        count = len(labels)
        return EpochOrder(count, seed, epoch, block, unit), np.broadcast_to(np.int64(0), count)


class _ByClass(Component, ABC):
    """As many draws an epoch as there are images: a class by its share, then any image of it.

    Draws are with replacement. Images that come again in an epoch do so in its next views, augmented anew.
    """

    by_class: ClassVar[bool] = True

    @abstractmethod
    def shares(self, counts: list[int]) -> list[Decimal]:
        """Return how often classes of so many images are drawn, up to a common factor; none of `counts` is 0."""

    def require_possible(self, dataset: ImageDataset, mixes: bool) -> None:
        """Raise RecipeError for images without labels, and for images that are mixed with partners."""
        if mixes:
            raise RecipeError(MIXED_SAMPLING)
        if is_multi_label(dataset.labels):
            raise RecipeError(
                "sampling by class draws images of one class each, these are of any number. Fix: leave out sampling; "
                "binary_cross_entropy takes positive_weight"
            )
        missing = int((dataset.labels == UNLABELLED).sum())
        if missing:
            raise RecipeError(
                f"sampling by class needs every image's label, {missing} of {len(dataset.ids)} have none. "
                "Fix: leave out sampling, or label them all"
            )

    def order(self, labels: Labels, seed: int, epoch: int, block: int | None, unit: int) -> tuple[Ints, Ints]:
        """Return the images [N] of an epoch in order, and how often each was drawn before in it.

        With `block`, those of a run of `block` consecutive images come together, as in `EpochOrder`.
        """
        assert unit == 1, "nothing is mixed"
        classes = np.asarray(labels, np.int64)
        images = self._draw(classes, seed, epoch)
        if block is not None and block < len(classes):
            images = images[np.argsort(block_ranks(len(classes), seed, epoch, block)[images // block], kind="stable")]
        return images, occurrences(images)

    def _draw(self, labels: Ints, seed: int, epoch: int) -> Ints:
        """Draw len(labels) images: two words a draw, one for the class, one for the image of it."""
        members = np.argsort(labels, kind="stable")
        classes, starts, counts = np.unique(labels[members], return_index=True, return_counts=True)
        limits = _limits(self.shares(counts.tolist()))
        images = np.empty(len(labels), np.int64)
        for start in range(0, len(labels), _BLOCK):
            slots = np.arange(start, min(start + _BLOCK, len(labels)), dtype=np.uint64)
            words = Draws(seed, np.full_like(slots, epoch), slots).words("sample", 0, 2)
            drawn = np.searchsorted(limits, words[:, 0], side="right")
            images[start : start + _BLOCK] = members[starts[drawn] + below(words[:, 1], counts[drawn])]
        assert len(limits) == len(classes) - 1
        return images


class ClassBalanced(_ByClass):
    """Draw each class equally often in expectation (Kang et al., "Decoupling representation and classifier", ICLR
    2020).
    """

    kind: Literal["class_balanced"] = "class_balanced"

    def shares(self, counts: list[int]) -> list[Decimal]:
        """Return the same for every class."""
        return [Decimal(1)] * len(counts)


class EffectiveNumber(_ByClass):
    """Draw images in inverse proportion to the effective number (1 - βⁿ) / (1 - β) of their class with n images.

    Cui et al., "Class-balanced loss based on effective number of samples" (CVPR 2019).
    """

    kind: Literal["effective_number"] = "effective_number"
    beta: Annotated[float, Field(gt=0.0, lt=1.0), Lenient] = Field(
        default=0.999,
        description="β of the effective number: near 0 it draws all images alike, near 1 as `class_balanced` does.",
    )

    def shares(self, counts: list[int]) -> list[Decimal]:
        """Return n over the effective number of n, for each class."""
        beta = Decimal(self.beta)
        with localcontext(_DIGITS):
            return [count * (1 - beta) / (1 - beta**count) for count in counts]


def occurrences(images: Ints) -> Ints:
    """Return how often each entry [N] came before: 0 for the first of its value, then 1, and so on."""
    order = np.argsort(images, kind="stable")
    ordered = images[order]
    places = np.arange(len(images))
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    counted = np.empty_like(images)
    counted[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return counted


def _limits(shares: list[Decimal]) -> Words:
    """Return the words, of 2³², at which the second class begins, the third, and so on: [K - 1].

    In decimal arithmetic, which is the same on every machine.
    """
    with localcontext(_DIGITS):
        *sums, total = itertools.accumulate(shares, initial=Decimal(0))
        return np.array([int(reached / total * 2**32) for reached in sums[1:]], dtype=np.uint64)


Sampling = Annotated[EveryImage | ClassBalanced | EffectiveNumber, Field(discriminator="kind")]
