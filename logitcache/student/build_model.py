"""Build the model to train and its adapters, and check that they fit what it learns from."""

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.models import (
    BuiltModel,
    Classifier,
    StoredModel,
    architecture_of,
    default_preprocessing,
    resolve_preprocessing,
)
from logitcache.models.taps.layouts import TapLayout, layouts_of
from logitcache.models.taps.taps import Tapped
from logitcache.reductions import ChannelLayout
from logitcache.student.lesson import Lesson
from logitcache.student.losses.base import Site
from logitcache.student.training_recipes import TrainingRecipe


def build_classifier(
    recipe: TrainingRecipe, lesson: Lesson, validation: Tensor | None, module: nn.Module | None = None
) -> Classifier:
    """Build the model and try it on black images of the training size, and on some to measure on, uint8 [B, C, H, W].

    `module` is the caller's own, with a normalisation if it is a Classifier, in place of the recipe's entry.
    Raises RecipeError for images that it cannot take, MismatchError for another number of classes.
    """
    num_channels = lesson.image_shape[0]
    if isinstance(module, Classifier):
        built = BuiltModel(module.module, module.preprocessing)
    elif module is not None:
        built = BuiltModel(module, None)
    else:
        assert recipe.model is not None, "require_entries looked for it"
        built = recipe.model.build(lesson.num_classes, num_channels)
    preprocessing = resolve_preprocessing(
        built, recipe.preprocessing, who="the recipe", default=default_preprocessing(num_channels)
    )
    classifier = Classifier(built.module, preprocessing)
    _try(classifier, black(lesson), lesson.num_classes, "the images")
    if validation is not None:
        _try(classifier, validation, lesson.num_classes, "the validation images")
    return classifier


def describe(recipe: TrainingRecipe, classifier: Classifier, lesson: Lesson) -> StoredModel:
    """Describe the model that a run will end with; reads what the recipe's model starts from, which may go later."""
    return StoredModel(
        model=None if recipe.model is None else architecture_of(recipe.model, classifier.module),
        preprocessing=classifier.preprocessing,
        num_classes=lesson.num_classes,
        in_channels=len(classifier.preprocessing.mean),
    )


def decide_layouts(
    recipe: TrainingRecipe, classifier: Classifier, images: Tensor, taps: Sequence[str] | None = None
) -> dict[str, ChannelLayout]:
    """Decide where taps, by default those of the losses, put their channels, on images uint8 [B, C, H, W].

    Raises RecipeError as `layouts_of`.
    """
    named = tuple(dict.fromkeys(recipe.taps if taps is None else taps))
    if not named:
        return {}
    asked = [TapLayout(tap, recipe.tap_layouts.get(tap, "auto")) for tap in named]
    inputs = classifier.eval().normalize(images)
    return dict(zip(named, layouts_of(classifier.module, inputs, asked, "the model"), strict=True))


def build_adapters(
    recipe: TrainingRecipe, lesson: Lesson, classifier: Classifier, layouts: Mapping[str, ChannelLayout] | None = None
) -> nn.ModuleList:
    """Build what each loss trains beside the model, or remembers; raises RecipeError for a wrong tap.

    `layouts` of the taps are those of `decide_layouts`.
    """
    decided = decide_layouts(recipe, classifier, black(lesson)) if layouts is None else layouts
    site = Site(
        _shapes_at(classifier, recipe.taps, lesson, decided), lesson.teachers, lesson.num_images, lesson.class_counts
    )
    adapters = nn.ModuleList()
    for number, loss in enumerate(recipe.losses):
        try:
            adapters.append(loss.adapter(site))
        except RecipeError as cause:
            raise RecipeError(f"losses.{number} ({loss.kind}): {cause}") from cause
    return adapters


@torch.no_grad()
def _shapes_at(
    classifier: Classifier, taps: Sequence[str], lesson: Lesson, layouts: Mapping[str, ChannelLayout]
) -> dict[str, tuple[int, ...]]:
    """Run the model on black images, in its evaluation mode so that nothing of it moves; shapes without the batch."""
    if not taps:
        return {}
    with closing(Tapped(classifier.eval(), classifier.module, taps, who="the model", layouts=layouts)) as tapped:
        _, found = tapped(black(lesson))
    return {tap: tuple(features.shape[1:]) for tap, features in found.items()}


def black(lesson: Lesson) -> Tensor:
    """Return two black images of the training size."""
    return torch.zeros((2, *lesson.image_shape), dtype=torch.uint8)


@torch.no_grad()
def _try(classifier: Classifier, images: Tensor, num_classes: int, what: str) -> None:
    try:
        found = classifier.eval()(images).shape[1]
    except LogitCacheError:
        raise
    except Exception as cause:  # the model's own code may raise anything
        raise RecipeError(
            f"the model cannot take {what}, uint8 {list(images.shape[1:])}: {cause}. "
            "Fix: augmentations that end at the model's size, or preprocessing.input_size"
        ) from cause
    if found != num_classes:
        raise MismatchError(
            f"the model predicts {found} classes, what it learns from has {num_classes}. "
            f"Fix: a model with {num_classes} classes"
        )
