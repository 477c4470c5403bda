"""`ViewSpec` describes views; `Views` renders them from a data set."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from logitcache.config.recipe import Extended
from logitcache.errors import DataError, RecipeError
from logitcache.views.augmentations import Augmentation
from logitcache.views.augmentations.base import Step
from logitcache.views.datasets.arranged import num_first
from logitcache.views.datasets.base import DecodedImages, ImageDataset, read_images
from logitcache.views.keys import Draws, Ints, ViewKey, columns_of
from logitcache.views.mixing.mixing import COLUMNS, Mixings, Mixture, PlanVersion, draw_mixture, newest_plan
from logitcache.views.mixing.partners import Partners
from logitcache.views.scaled_decoding import Decode, factors, reduced

if TYPE_CHECKING:
    from logitcache.views.paired import Frame

_SMALL = 1 << 16  # bytes of an image that is better augmented together with others

Recorded = Callable[[Sequence[ViewKey]], Ints]
"""Rows of integers by key, [B, P]."""

FIX_OF_SIZES = (
    "end the augmentations with a crop to a fixed size, such as {kind: resize, size: 256}, "
    "{kind: center_crop, size: 224}"
)


class ViewSpec(Extended):
    """Deterministically augmented copies of every image.

    The pixels of a view are a pure function of these entries, the key (view, image) and the number of images;
    `num_views` only sets how many views are used. With `mixing`, each image is mixed with a partner, a different one in
    each view; partners are mutual.
    """

    added: ClassVar[frozenset[str]] = frozenset({"decode"})

    num_views: Annotated[int, Field(ge=1, lt=2**32)] = Field(
        default=1,
        description="Number of views: augmented copies of every image. A larger number adds views to a finished cache.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(
        default=0, description="Seed of the augmentations and of the mixed pairs."
    )
    augmentations: Annotated[tuple[Augmentation, ...], Field(max_length=64)] = Field(
        default=(),
        description="Augmentations, applied in this order. Images of different sizes need a crop or a resize to a "
        "fixed size at the end.",
        examples=[[{"kind": "random_resized_crop", "size": 224}, {"kind": "horizontal_flip"}]],
    )
    decode: Decode = "full"
    mixing: Mixings = ()
    pairing_window: Annotated[int, Field(ge=2, multiple_of=2)] | None = Field(
        default=None,
        description="Number of consecutive images (even) within which partners are chosen; by default all. With a "
        "divisor of `shard_rows`, stage one decodes each image once, otherwise up to twice. For data sorted by class, "
        "choose a window of many classes; for packed arrays, one of few shards.",
        examples=[4096],
    )
    targets: Literal["exact", "linear"] = Field(
        default="exact",
        description="Targets of mixed images. `exact`: the teacher's outputs for the mixed image. `linear`: its "
        "outputs for the two images are mixed, an approximation without features.",
    )
    plan_version: PlanVersion = Field(
        default_factory=lambda given: newest_plan(given.get("mixing", ())),
        description="How parameters are drawn from keys: 1, or 2 for views with `cutmix`, whose boxes are then "
        "exact in area. By default the newest for new caches; a cache that grows keeps its own.",
        examples=[1],
    )

    @model_validator(mode="after")
    def _mixes_something(self) -> Self:
        if not self.mixing and (self.pairing_window is not None or self.targets != "exact"):
            raise ValueError("`pairing_window` and `targets` are options of mixing: give `mixing`, or leave them out")
        return self

    def digest(self) -> str:
        """Return the sha256 of all that decides the pixels, as hex."""
        text = json.dumps(self.model_dump(mode="json", exclude={"num_views"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def answered(self) -> "ViewSpec":
        """Return the views that the teacher answers: these, but for linear targets those before mixing."""
        if self.targets == "exact":
            return self
        return self.model_copy(update={"mixing": (), "pairing_window": None, "targets": "exact"})

    def factors(self, sizes: Ints) -> Ints:
        """Return by which factor JPEG of `sizes` [B, 2] is reduced as it is decoded, [B]: the same for all views."""
        return factors(self.augmentations, sizes)

    def partners(self, num_images: int, num_first: int) -> Partners | None:
        """Return the pairs of images of a cache that began with `num_first`; None without mixing."""
        return Partners(self.seed, num_images, self.pairing_window or num_images, num_first) if self.mixing else None

    def plan(self, keys: Sequence[ViewKey], sizes: Ints) -> tuple[list[Ints], Ints]:
        """Draw each augmentation's parameters, int64 [B, P] each, for images of `sizes` [B, 2].

        Also returns the sizes of the views [B, 2]. DataError names an image that is too small.
        """
        steps = list(self.steps(keys, sizes))
        return [step.params for step in steps], steps[-1].after if steps else sizes

    def steps(self, keys: Sequence[ViewKey], sizes: Ints) -> Iterator[Step]:
        """Draw the parameters of one augmentation after the other, with the sizes that images have around it."""
        draws = Draws.of(self.seed, keys)
        seen: Counter[str] = Counter()
        for augmentation in self.augmentations:
            params, after = augmentation.plan(draws, seen[augmentation.kind], sizes)
            yield Step(augmentation, params, sizes, after)
            seen[augmentation.kind] += 1
            sizes = after

    def mixture(self, keys: Sequence[ViewKey], partners: Partners | None, size: tuple[int, int]) -> Mixture | None:
        """Draw how the views of `keys`, of one (height, width), are mixed with their partners; None without these."""
        if partners is None:
            return None
        draws = Draws.of(self.seed, keys)
        found = partners.partners(draws.views.astype(np.int64), draws.indices.astype(np.int64))
        return draw_mixture(self.mixing, draws, found, size, self.plan_version)

    def columns(self) -> tuple[str, ...]:
        """Name the integers that are drawn for a view: those of each augmentation, then those of the mixing."""
        drawn = [
            f"{number}.{augmentation.kind}.{column}"
            for number, augmentation in enumerate(self.augmentations)
            for column in augmentation.columns
        ]
        return (*drawn, *(f"mixing.{column}" for column in COLUMNS if self.mixing))

    @property
    def is_random(self) -> bool:
        """Whether views of an image differ."""
        return bool(self.mixing) or any(augmentation.is_random for augmentation in self.augmentations)

    def rows(self, keys: Sequence[ViewKey], sizes: Ints, partners: Partners | None) -> Ints:
        """Draw all integers of views of images of `sizes` [B, 2], named by `columns`: [B, P]."""
        plans, rendered = self.plan(keys, sizes)
        height, width = rendered[0].tolist()
        mixture = self.mixture(keys, partners, (height, width))
        parts = [np.empty((len(keys), 0), dtype=np.int64), *plans]
        return np.concatenate(parts if mixture is None else [*parts, mixture.rows()], axis=1)

    def split(self, rows: Ints) -> tuple[list[Ints], Mixture | None]:
        """Take apart what `rows` gave, into what each augmentation and the mixing drew."""
        *plans, rest = np.split(rows, np.cumsum([len(one.columns) for one in self.augmentations]), axis=1)
        return plans, Mixture.of_rows(rest) if self.mixing else None

    def render(self, images: list[Tensor], plans: list[Ints]) -> list[tuple[list[int], Tensor]]:
        """Augment decoded images, uint8 [C, H, W] each, by their plans.

        Returns rows and their views [G, C, H, W], for each group of images that were augmented together.
        """
        # Small images by shape; large ones alone, as copying them together would cost more than it saves.
        groups: dict[torch.Size | int, list[int]] = {}
        for row, image in enumerate(images):
            groups.setdefault(image.shape if image.numel() <= _SMALL else row, []).append(row)
        rendered = []
        for rows in groups.values():
            batch = images[rows[0]][None] if len(rows) == 1 else torch.stack([images[row] for row in rows])
            for augmentation, params in zip(self.augmentations, plans, strict=True):
                batch = augmentation.apply(batch, params if len(rows) == len(images) else params[rows])
            rendered.append((rows, batch))
        return rendered


class Views:
    """The views of a data set, by key: usable as a map-style data set of torch.

    `recorded` gives rows of integers [B, P], named by the spec's `columns`, to replay in place of drawing them. With a
    `frame`, the data set has paired images, which are rendered as the frame says. `images` are those of `dataset` as
    they are decoded for these views.
    """

    def __init__(
        self, dataset: ImageDataset, spec: ViewSpec, recorded: Recorded | None = None, frame: "Frame | None" = None
    ) -> None:
        self.dataset = dataset
        is_full = spec.decode == "full" or frame is not None  # how far is a rule of the teacher's images
        self.images: DecodedImages = dataset if is_full else reduced(dataset, spec.factors)
        self.spec, self.recorded, self.frame = spec, recorded, frame

    def __getitem__(self, key: ViewKey) -> Tensor:
        """Render one view, uint8 [C, H, W]."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[ViewKey]) -> Tensor:
        """Render a batch, uint8 [B, C, H, W]; an image that several keys name is decoded once."""
        if not self.spec.mixing:
            return self._augmented(keys)
        both = [*keys, *self.partners(keys)]
        unique = list(dict.fromkeys(both))
        rendered = self._augmented(unique)
        row_of = {key: row for row, key in enumerate(unique)}
        own, other = (np.array([row_of[key] for key in half]) for half in (both[: len(keys)], both[len(keys) :]))
        mixed = rendered[torch.from_numpy(own).to(rendered.device)]
        mixture = self.mixture(keys, mixed.shape[2:])
        assert mixture is not None
        return (mixture.apply_ if mixed.is_cpu else mixture.apply_in_batches)(mixed, rendered, other)

    def mixture(self, keys: Sequence[ViewKey], size: Sequence[int]) -> Mixture | None:
        """Return how the views of `keys`, rendered in one (height, width), are mixed; None if nothing is."""
        if not self.spec.mixing:
            return None
        if self.recorded is not None:
            found = self.spec.split(self.recorded(keys))[1]
        else:
            height, width = size if self.frame is None else self.frame.scale.seen
            found = self.spec.mixture(keys, self.pairs, (height, width))
        return found if found is None or self.frame is None else self.frame.mixture(found)

    def rows(self, keys: Sequence[ViewKey], sizes: Ints) -> Ints:
        """Return all integers by which views of images of `sizes` [B, 2] are rendered, [B, P]."""
        if self.frame is None:
            return self.spec.rows(keys, sizes, self.pairs) if self.recorded is None else self.recorded(keys)
        mixture = self.mixture(keys, self.frame.scale.seen)
        parts = [np.empty((len(keys), 0), np.int64), *self._plans(keys, sizes)]
        return np.concatenate(parts if mixture is None else [*parts, mixture.rows()], axis=1)

    def planned_sizes(self, keys: Sequence[ViewKey], sizes: Ints) -> Ints:
        """Return the sizes [B, 2] of views of images of `sizes`. DataError names an image that is too small."""
        return self.spec.plan(keys, sizes)[1] if self.frame is None else self.frame.plan(keys, sizes)[1]

    def _plans(self, keys: Sequence[ViewKey], sizes: Ints) -> list[Ints]:
        recorded = None if self.recorded is None else self.spec.split(self.recorded(keys))[0]
        if self.frame is not None:
            return self.frame.plan(keys, sizes, recorded)[0]
        return self.spec.plan(keys, sizes)[0] if recorded is None else recorded

    def answered(self) -> "Views":
        """Return the views that the teacher answers."""
        return Views(self.dataset, self.spec.answered(), frame=self.frame)

    @property
    def pairs(self) -> Partners | None:
        """The pairs of images that are mixed; None without mixing."""
        return self.spec.partners(len(self.dataset.ids), num_first(self.dataset))

    def partners(self, keys: Sequence[ViewKey]) -> list[ViewKey]:
        """Return the views that those of `keys` are mixed with; if nothing is mixed, the same."""
        if not self.spec.mixing:
            return list(keys)
        views, indices = columns_of(keys)
        if self.recorded is not None and (mixture := self.spec.split(self.recorded(keys))[1]) is not None:
            found = mixture.partners
        else:
            assert self.pairs is not None
            found = self.pairs.partners(views, indices)
        return list(map(ViewKey, views.tolist(), found.tolist()))

    def _augmented(self, keys: Sequence[ViewKey]) -> Tensor:
        """Render views as they are before mixing."""
        indices = list({key[1] for key in keys})
        decoded = dict(zip(indices, read_images(self.images, indices), strict=True))
        images = [decoded[key[1]] for key in keys]
        sizes = np.array([image.shape for image in images], dtype=np.int64)[:, 1:]
        plans = self._plans(keys, sizes)
        try:
            groups = self.spec.render(images, plans) if self.frame is None else self.frame.render(keys, images, plans)
        except RecipeError as error:
            raise self._blamed(images, plans, keys, error) from error
        if len(groups) == 1:
            return groups[0][1].contiguous()
        views = {row: view for rows, batch in groups for row, view in zip(rows, batch.unbind(), strict=True)}
        return self.stack([views[row] for row in range(len(keys))], keys)

    def _blamed(
        self, images: list[Tensor], plans: list[Ints], keys: Sequence[ViewKey], error: RecipeError
    ) -> RecipeError:
        """Find the image of a batch for which the user's own transform fails; returns the error that names it."""
        for row, key in enumerate(keys):
            try:
                self.spec.render([images[row]], [params[row : row + 1] for params in plans])
            except RecipeError as found:
                return RecipeError(f"view {key[0]} of image {self.dataset.ids[key[1]]!r}: {found}")
        return error

    def stack(self, rendered: list[Tensor], keys: Sequence[ViewKey]) -> Tensor:
        """Join the views of `keys` to uint8 [B, C, H, W]; raise DataError naming two images of different shapes."""
        for key, image in zip(keys, rendered, strict=True):
            if image.shape != rendered[0].shape:
                first, other = self.dataset.ids[keys[0][1]], self.dataset.ids[key[1]]
                alike = "give every image the same channels; the data sets that read files have `mode` for it"
                raise DataError(
                    f"views must have one shape: {first!r} gives {tuple(rendered[0].shape)}, {other!r} gives "
                    f"{tuple(image.shape)}. Fix: {FIX_OF_SIZES if len(rendered[0]) == len(image) else alike}"
                )
        return torch.stack(rendered)
