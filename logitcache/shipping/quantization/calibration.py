"""Unaugmented images of the data that a run learnt from, as its evaluation transforms them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.cache import open_uncompared
from logitcache.errors import RecipeError
from logitcache.shipping.metadata import Metadata
from logitcache.student.evaluation.open_run import require_known_images, require_known_source
from logitcache.student.lesson import pairing_of, views_of
from logitcache.student.runs.trained import EvaluationTransform
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.arranged import present
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.datasets.custom import Custom


def calibration_images(
    run: Path,
    recipe: StudentRecipe | TeacherRecipe,
    metadata: Metadata,
    count: int,
    overrides: Sequence[str] = (),
) -> Tensor:
    """Return `count` images of a run's training data, evenly spread, uint8 [N, C, h, w]; all if there are fewer.

    Raises as the opening of a cache or a data set if the images are not there.
    """
    dataset = _dataset(run, recipe, overrides)
    transform = EvaluationTransform(metadata.evaluation.augmentations, metadata.shape[0])
    there = present(dataset)
    indices = there[np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(np.int64)]
    images = [transform(dataset.read(int(index))) for index in indices]
    if wrong := [image for image in images if tuple(image.shape) != metadata.shape]:
        raise RecipeError(
            f"the training images of {run} become {list(wrong[0].shape)} by the transform of its evaluation, "
            f"those that it was measured on {list(metadata.shape)}. Fix: validate on images of one size"
        )
    return torch.stack(images)


def _dataset(run: Path, recipe: StudentRecipe | TeacherRecipe, overrides: Sequence[str]) -> ImageDataset:
    require_known_source(run, recipe, overrides)
    if isinstance(recipe, StudentRecipe):
        require_known_images(run, recipe, overrides)
        cache = open_uncompared(recipe.cache)
        return views_of(cache, recipe.dataset, recipe, pairing=pairing_of(recipe, cache)).dataset
    if recipe.dataset is None or (isinstance(recipe.dataset, Custom)):
        raise RecipeError(f"{run} learnt from images of code, which a file never calls. Fix: --set dataset=…")
    return open_dataset(recipe.dataset)
