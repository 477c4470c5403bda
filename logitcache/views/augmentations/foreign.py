"""The escape hatch: transforms of torchvision, or of the user, that draw from the global generators.

The global generators are seeded from the key of each image and restored afterwards. How a transform uses its seed may
change with any release: a cache records the release of torchvision, and these augmentations refuse another.
"""

import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, JsonValue, model_validator
from torch import Tensor

from logitcache.config.factories import call_factory
from logitcache.config.recipe import Component
from logitcache.errors import RecipeError, did_you_mean
from logitcache.views.augmentations.base import AugmentationBase, Size, pair, sizes_of
from logitcache.views.datasets.images.random_state import untouched
from logitcache.views.keys import Draws, Ints

ImageTransform = Callable[[Tensor], object]

NewSize = Annotated[
    Size | None,
    Field(
        description="Side of the result, or [height, width], if the transform changes the size of an image; by default "
        "it does not.",
        examples=[32],
    ),
]
DrawnBy = Annotated[
    str, Field(description="Release of torchvision that draws the transform; set by stage one, do not set it yourself.")
]

SEEDS = ("torch_seed", "numpy_seed", "python_seed")


class ForeignTransform(NamedTuple):
    """The transform of an augmentation: its name in messages, the release of torchvision, the user's function."""

    what: str
    torchvision: str
    factory: str | None


def _plan(draws: Draws, stream: str, ordinal: int, sizes: Ints, size: Size | None) -> tuple[Ints, Ints]:
    """Draw the seeds of torch's, numpy's and Python's generator; `size` is what the transform makes of an image."""
    seeds = draws.words(stream, ordinal, 3).astype(np.int64)
    return seeds, sizes if size is None else sizes_of(len(sizes), pair(size))


def _apply(what: str, transform: ImageTransform, images: Tensor, seeds: Ints, size: Size | None) -> Tensor:
    wanted = (images.shape[1], *(images.shape[2:] if size is None else pair(size)))
    results = []
    with untouched():
        for image, (of_torch, of_numpy, of_python) in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(of_torch)
            np.random.seed(of_numpy)
            random.seed(of_python)
            try:
                # A copy: it may write into its argument.
                results.append(transform(image.clone(memory_format=torch.contiguous_format)))
            except (Exception, SystemExit) as cause:  # the user's code may raise anything; it stays as the cause
                raise RecipeError(
                    f"{what} failed on an image of shape {tuple(image.shape)}: {type(cause).__name__}: {cause}. Fix: "
                    "let it take every image, or put what it needs, such as a resize, before it"
                ) from cause
    return torch.stack([_checked(what, result, wanted) for result in results])


def _checked(what: str, image: object, wanted: tuple[int, ...]) -> Tensor:
    """Return what a transform gave as a plain tensor; raise RecipeError for anything but uint8 of the wanted shape."""
    if not isinstance(image, Tensor):
        raise RecipeError(f"{what} returns a {type(image).__name__}. Fix: return a uint8 tensor [C, H, W]")
    if image.dtype != torch.uint8 or tuple(image.shape) != wanted:
        raise RecipeError(
            f"{what} returns {image.dtype} {tuple(image.shape)}, uint8 {wanted} was expected. Fix: keep uint8 and the "
            "channels; if it changes the size, give the new one as `size`"
        )
    return image.as_subclass(Tensor)


class Torchvision(AugmentationBase):
    """Any transform of torchvision.transforms.v2, by the name of its class.

    The global generators of torch, numpy and Python are seeded from the key for each image, and restored. What a
    transform draws may change with any release, so a cache made with one needs the same release of torchvision:
    students with another are refused or, with `verify: numeric`, accepted if the canaries are within the limits.
    """

    columns: ClassVar[tuple[str, ...]] = SEEDS

    kind: Literal["torchvision"] = "torchvision"
    name: str = Field(description="Class of torchvision.transforms.v2.", examples=["ElasticTransform"])
    options: dict[str, JsonValue] = Field(default={}, description="Arguments of the class.")
    size: NewSize = None
    torchvision_version: DrawnBy = Field(default_factory=lambda: version("torchvision"))

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.torchvision_version == version("torchvision"):
            self._transform()
        return self

    def _transform(self) -> ImageTransform:
        return _torchvision_transform(self.name, json.dumps(self.options, sort_keys=True))

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw seeds."""
        return _plan(draws, "transform", ordinal, sizes, self.size)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Call the transform on each image, with its seeds."""
        return _apply(f"torchvision's {self.name}", self._transform(), images, params, self.size)


class Custom(AugmentationBase):
    """The callable that your own function returns, from one uint8 tensor [C, H, W] to another.

    Generators are seeded, and the release of torchvision is recorded, as for `torchvision`. Code named in a cache is
    never run: a student of such a cache lists the function in `factories`.
    """

    columns: ClassVar[tuple[str, ...]] = SEEDS

    kind: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] = Field(
        description="Function that returns the callable, as `package.module:function`.",
        examples=["mypackage.views:sharpen"],
    )
    arguments: dict[str, JsonValue] = Field(default={}, description="Keyword arguments of the function.")
    size: NewSize = None
    torchvision_version: DrawnBy = Field(default_factory=lambda: version("torchvision"))

    def plan(self, draws: Draws, ordinal: int, sizes: Ints) -> tuple[Ints, Ints]:
        """Draw seeds."""
        return _plan(draws, "custom", ordinal, sizes, self.size)

    def apply(self, images: Tensor, params: Ints) -> Tensor:
        """Call the user's callable on each image, with its seeds."""
        transform = _custom_transform(self.factory, json.dumps(self.arguments, sort_keys=True))
        return _apply(f"'{self.factory}'", transform, images, params, self.size)


def foreign_transforms(augmentations: Sequence[Component]) -> Iterator[ForeignTransform]:
    """Yield the transforms of torchvision and of the user among augmentations."""
    for augmentation in augmentations:
        if isinstance(augmentation, Torchvision):
            yield ForeignTransform(f"torchvision's {augmentation.name}", augmentation.torchvision_version, None)
        elif isinstance(augmentation, Custom):
            yield ForeignTransform(f"'{augmentation.factory}'", augmentation.torchvision_version, augmentation.factory)


def factories_of(augmentations: Sequence[Component]) -> list[str]:
    """Return the user's functions that augmentations call."""
    return [one.factory for one in foreign_transforms(augmentations) if one.factory is not None]


@functools.cache
def _torchvision_transform(name: str, options: str) -> ImageTransform:
    from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

    made = getattr(v2, name, None)
    if not (isinstance(made, type) and issubclass(made, v2.Transform)):
        known = [each for each in dir(v2) if isinstance(getattr(v2, each), type)]
        raise RecipeError(f"torchvision.transforms.v2 has no transform '{name}'.{did_you_mean(name, known)}")
    try:
        enums = {"interpolation": InterpolationMode, "policy": AutoAugmentPolicy}
        given = json.loads(options).items()
        texts = {n: enums[n](value) if n in enums and isinstance(value, str) else value for n, value in given}
        transform: ImageTransform = made(**texts)
    except (TypeError, ValueError) as cause:
        raise RecipeError(f"torchvision's {name} does not take these options: {cause}") from cause
    return transform


@functools.cache
def _custom_transform(factory: str, arguments: str) -> ImageTransform:
    made = call_factory(factory, json.loads(arguments))
    if not callable(made):
        raise RecipeError(f"'{factory}' returned a {type(made).__name__}. Fix: return a callable")
    return made
