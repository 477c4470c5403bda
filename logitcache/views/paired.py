"""Paired images: a student's images of the things that a teacher saw in others, in one geometry, each at its size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from logitcache.views.augmentations.base import AugmentationBase, Scale, rescaled_boxes
from logitcache.views.augmentations.blur import GaussianBlur
from logitcache.views.augmentations.color import ColorJitter, RandomGrayscale
from logitcache.views.datasets.arranged import ABSENT, ArrangedImages
from logitcache.views.datasets.base import ImageDataset, Labels
from logitcache.views.keys import Draws, Ints, ViewKey, columns_of
from logitcache.views.mixing.mixing import Mixture
from logitcache.views.spec import ViewSpec

UNPAIRED = ABSENT
"""Place of an image that has no pair."""

Color = Annotated[ColorJitter | RandomGrayscale | GaussianBlur, Field(discriminator="kind")]
"""A change of colour, which paired images have of their own."""


def paired_images(
    images: ImageDataset,
    rows: Ints,
    num_first: int,
    labels: Labels,
    num_classes: int | None,
    class_names: tuple[str, ...] | None,
) -> ArrangedImages:
    """Return images in the order of those that a teacher saw, with the labels of these; as `ArrangedImages`.

    `rows` [N] are the places of the paired images in `images`, UNPAIRED for none.
    """
    ids = images.ids
    names = ["" if row == UNPAIRED else ids[row] for row in rows.tolist()]
    return ArrangedImages(images, rows, num_first, names, labels, num_classes, class_names, "has no paired image")


@dataclass(frozen=True)
class Frame:
    """How paired images are rendered: by the parameters of the teacher's views of `spec`, carried to their sizes.

    `sizes` [N, 2] are those of the teacher's images; `channels` those of the paired ones, which have changes of
    colour of their own, `colors`, by the same keys. Raises RecipeError for augmentations whose geometry is unknown.
    """

    spec: ViewSpec
    sizes: Ints
    scale: Scale
    channels: int
    colors: tuple[Color, ...] = ()

    @cached_property
    def _beside(self) -> list[AugmentationBase | None]:
        return [one.beside(self.scale, self.channels) for one in self.spec.augmentations]

    @cached_property
    def _rendered(self) -> ViewSpec:
        kept = [one for one in self._beside if one is not None]
        return self.spec.model_copy(update={"augmentations": (*kept, *self.colors)})

    def plan(
        self, keys: Sequence[ViewKey], sizes: Ints, recorded: Sequence[Ints] | None = None
    ) -> tuple[list[Ints], Ints]:
        """Return parameters and sizes of the views of paired images of `sizes` [B, 2].

        `recorded` are the parameters of the teacher's own, to carry in place of drawing them.
        """
        plans, seen = [], self.sizes[columns_of(keys)[1]]
        for number, step in enumerate(self.spec.steps(keys, seen)):
            if self._beside[number] is not None:
                params = step.params if recorded is None else recorded[number]
                carried, sizes = step.augmentation.carried(params, step.before, step.after, sizes, self.scale)
                plans.append(carried)
        draws, drawn = Draws.of(self.spec.seed, keys), Counter[str]()
        for color in self.colors:
            params, sizes = color.plan(draws, drawn[color.kind], sizes)
            drawn[color.kind] += 1
            plans.append(params)
        return plans, sizes

    def render(
        self, keys: Sequence[ViewKey], images: list[Tensor], plans: list[Ints]
    ) -> list[tuple[list[int], Tensor]]:
        """Augment paired images as `ViewSpec.render` does, those together that the teacher saw in one size."""
        seen = self.sizes[columns_of(keys)[1]]
        if (seen == seen[0]).all():
            return self._rendered.render(images, plans)
        groups = []
        for size in np.unique(seen, axis=0):
            rows = np.flatnonzero((seen == size).all(axis=1))
            of_size = self._rendered.render([images[row] for row in rows], [params[rows] for params in plans])
            groups += [(rows[some].tolist(), views) for some, views in of_size]
        return groups

    def mixture(self, mixture: Mixture) -> Mixture:
        """Scale the boxes of a mixture; the weights of labels stay those of the teacher's views."""
        return mixture._replace(
            boxes=rescaled_boxes(mixture.boxes, np.array(self.scale.seen), np.array(self.scale.shown))
        )
