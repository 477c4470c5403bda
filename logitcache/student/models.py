"""The model to train, proved to fit what it learns from before the first step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.models import Classifier, default_preprocessing, resolve_preprocessing
from logitcache.models.taps import Tapped
from logitcache.student.losses import Loss
from logitcache.student.losses.base import Site
from logitcache.student.recipes import TrainingRecipe
from logitcache.student.sources import Source
from logitcache.views.keys import ViewKey


def build_classifier(recipe: TrainingRecipe, source: Source, validation: Tensor | None) -> Classifier:
    """Build the model and try it on black images of the training size, and on some to measure on, uint8 [B, C, H, W].

    Raises RecipeError for images that it cannot take, MismatchError for another number of classes.
    """
    shape = source.loader.views[ViewKey(0, 0)].shape
    built = recipe.model.build(source.num_classes, shape[0])
    preprocessing = resolve_preprocessing(
        built, recipe.preprocessing, who="the recipe", default=default_preprocessing(shape[0])
    )
    classifier = Classifier(built.module, preprocessing)
    _try(classifier, torch.zeros((2, *shape), dtype=torch.uint8), source.num_classes, "the images")
    if validation is not None:
        _try(classifier, validation, source.num_classes, "the validation images")
    return classifier


def build_adapters(recipe: TrainingRecipe, source: Source, classifier: Classifier) -> nn.ModuleList:
    """Build what each loss trains beside the model, or remembers; raises RecipeError for a wrong tap."""
    taps = tuple(dict.fromkeys(tap for loss in recipe.losses for tap in loss.taps))
    site = Site(_shapes_at(classifier, taps, source), source.teachers, source.num_images, source.class_counts)
    return nn.ModuleList(_adapter(number, loss, site) for number, loss in enumerate(recipe.losses))


def _adapter(number: int, loss: Loss, site: Site) -> nn.Module:
    try:
        return loss.adapter(site)
    except RecipeError as cause:
        raise RecipeError(f"losses.{number} ({loss.kind}): {cause}") from cause


@torch.no_grad()
def _shapes_at(classifier: Classifier, taps: Sequence[str], source: Source) -> dict[str, tuple[int, ...]]:
    """Run the model on black images, in its evaluation mode so that nothing of it moves; shapes without the batch."""
    if not taps:
        return {}
    tapped = Tapped(classifier.eval(), classifier.module, taps, who="the model")
    try:
        image = source.loader.views[ViewKey(0, 0)]
        _, found = tapped(torch.zeros((2, *image.shape), dtype=torch.uint8))
    finally:
        tapped.remove()
    return {tap: tuple(features.shape[1:]) for tap, features in found.items()}


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
