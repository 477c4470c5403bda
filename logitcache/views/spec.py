"""`ViewSpec` says which pixels; `Views` renders them from a data set."""

import hashlib
import json
from collections import Counter
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from logitcache.errors import DataError
from logitcache.recipe import Component
from logitcache.views.augmentations import Augmentation, Ints
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import Draws, ViewKey


class ViewSpec(Component):
    """A number of deterministically augmented copies of every image.

    The pixels of a view are a pure function of `augmentations`, `seed` and `plan_version`; `num_views` only says how
    many of the endless row of views there are.
    """

    num_views: Annotated[int, Field(ge=1, lt=2**32)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    augmentations: Annotated[tuple[Augmentation, ...], Field(max_length=64)] = ()
    plan_version: Literal[1] = 1

    def digest(self) -> str:
        """Return the sha256 of all that decides the pixels, as hex."""
        text = json.dumps(self.model_dump(mode="json", exclude={"num_views"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def plan(self, keys: list[ViewKey], sizes: Ints) -> list[Ints]:
        """Draw each augmentation's parameters, int64 [B, P] each, for images of `sizes` [B, 2]."""
        draws = Draws.of(self.seed, keys)
        seen: Counter[str] = Counter()
        plans = []
        for augmentation in self.augmentations:
            params, sizes = augmentation.plan(draws, seen[augmentation.kind], sizes)
            seen[augmentation.kind] += 1
            plans.append(params)
        return plans

    def render(self, images: list[Tensor], keys: list[ViewKey]) -> list[Tensor]:
        """Augment decoded images, uint8 [C, H, W] each; those of one shape are augmented together."""
        plans = self.plan(keys, np.array([image.shape[1:] for image in images], dtype=np.int64))
        rendered: list[Tensor] = [torch.empty(0)] * len(images)
        for rows in _rows_by_shape(images):
            batch = torch.stack([images[row] for row in rows])
            for augmentation, params in zip(self.augmentations, plans, strict=True):
                batch = augmentation.apply(batch, params[rows])
            for row, image in zip(rows, batch, strict=True):
                rendered[row] = image
        return rendered


def _rows_by_shape(images: list[Tensor]) -> list[list[int]]:
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return list(rows.values())


class Views:
    """The views of a data set, by key: usable as a map-style data set of torch."""

    def __init__(self, dataset: ImageDataset, spec: ViewSpec) -> None:
        self.dataset = dataset
        self.spec = spec

    def __getitem__(self, key: ViewKey) -> Tensor:
        """Render one view, uint8 [C, H, W]."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[ViewKey]) -> Tensor:
        """Render a batch, uint8 [B, C, H, W]; an image that several keys name is decoded once."""
        decoded = {index: self.dataset.read(index) for index in {key[1] for key in keys}}
        return self.stack(self.spec.render([decoded[key[1]] for key in keys], keys), keys)

    def stack(self, rendered: list[Tensor], keys: list[ViewKey]) -> Tensor:
        """Join the views of `keys` to uint8 [B, C, H, W]; raise DataError naming two images of different shapes."""
        for key, image in zip(keys, rendered, strict=True):
            if image.shape != rendered[0].shape:
                first, other = self.dataset.ids[keys[0][1]], self.dataset.ids[key[1]]
                raise DataError(
                    f"views must have one shape: {first!r} gives {tuple(rendered[0].shape)}, {other!r} gives "
                    f"{tuple(image.shape)}. Fix: {_fix_of_shapes(rendered[0], image)}"
                )
        return torch.stack(rendered)


def _fix_of_shapes(one: Tensor, other: Tensor) -> str:
    if len(one) != len(other):
        return "give every image the same channels; the data sets that read files have `mode` for it"
    return (
        "end views.augmentations with a crop to a fixed size, such as {kind: resize, size: 256}, "
        "{kind: center_crop, size: 224}"
    )
