"""What the kinds of models share: what a builder returns, and which preprocessing a model takes."""

from collections.abc import Collection, Mapping
from typing import Annotated, NamedTuple, Self

from pydantic import Field, JsonValue
from torch import nn

from logitcache.classifier import Preprocessing
from logitcache.config.recipe import Component, Count
from logitcache.errors import RecipeError

Side = Annotated[Count, Field(le=2048)]
"""Pixels of a side of the images of a network that a file describes."""


class PretrainedFacts(NamedTuple):
    """What weights were trained on: number of classes, preprocessing, and the shorter side before the centre crop."""

    num_classes: int
    preprocessing: Preprocessing
    resize: int


class OwnArchitecture(Component):
    """An entry of a model that names no weights: it is its own architecture."""

    def architecture(self) -> Self:
        """Return itself."""
        return self


class BuiltModel(NamedTuple):
    """A network, float [B, C, h, w] to logits [B, K], and its preprocessing if that is known."""

    module: nn.Module
    preprocessing: Preprocessing | None


def risky_options(options: Mapping[str, JsonValue], plain: Collection[str]) -> tuple[str, ...]:
    """Name the options of a builder that only a user may set: all but rates and switches of the names in `plain`."""
    return tuple(
        f"the option {name}={value!r:.80}"
        for name, value in options.items()
        if name not in plain or not (isinstance(value, bool) or (isinstance(value, int | float) and 0 <= value <= 1))
    )


def default_preprocessing(in_channels: int) -> Preprocessing:
    """Return mean 0.5 and std 0.5 per channel: a student learns under any normalisation."""
    return Preprocessing(mean=(0.5,) * in_channels, std=(0.5,) * in_channels)


def resolve_preprocessing(
    built: BuiltModel,
    given: Preprocessing | None,
    *,
    who: str,
    default: Preprocessing | None = None,
) -> Preprocessing:
    """Return the preprocessing that the recipe gives, else that of the model's source, else the default.

    `who` names the model as the recipe does ("teachers.resnet"). Raises RecipeError without any of the three: a trained
    network under a guessed normalisation is quietly a worse one.
    """
    chosen = given or built.preprocessing or default
    if chosen is None:
        raise RecipeError(
            f"{who} does not know how its pixels were normalised in training.\n"
            f"  Fix: give it beside its model, as in {who}.preprocessing: {{mean: [0.485, 0.456,"
            " 0.406], std: [0.229, 0.224, 0.225]}, of pixels in 0..1;"
            " or pass lc.Classifier(module, lc.Preprocessing(mean=…, std=…)) in place of a module."
        )
    return chosen
