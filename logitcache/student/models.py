"""The model to train, proved to fit what it learns from before the first step."""

import torch
from torch import Tensor

from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.models import Classifier, default_preprocessing, resolve_preprocessing
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
