"""What a recipe names, opened: its images and teachers, or the objects that are passed in their place."""

from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import nn

from logitcache.cache.format.metadata import ROOT, read_manifest
from logitcache.config.recipe import Component, require_effect
from logitcache.errors import RecipeError
from logitcache.store.base import Store
from logitcache.teacher.answers import taking
from logitcache.teacher.classes import outputs_of
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher, TeacherSource, build_teacher
from logitcache.views import canaries
from logitcache.views.augmentations.foreign import foreign_transforms
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.spec import Views


def as_recorded(recipe: PrecomputeRecipe, store: Store) -> PrecomputeRecipe:
    """Draw views by the plan of the cache that the recipe continues, unless the recipe states another.

    Raises RecipeError for options without effect if the cache is new.
    """
    if not (store.path / ROOT).is_file():
        require_effect(recipe)
        return recipe
    if "plan_version" in recipe.views.model_fields_set:
        return recipe
    views = recipe.views.model_copy(update={"plan_version": read_manifest(store).views.plan_version})
    return recipe.model_copy(update={"views": views})


def open_images(recipe: PrecomputeRecipe, dataset: object | None) -> ImageDataset:
    """Open the images of the recipe, or those passed in their place."""
    given = recipe.dataset if dataset is None else dataset
    if given is None:
        raise RecipeError("the recipe names no data set. Fix: give `dataset:`, or pass the data set itself")
    for used in foreign_transforms(recipe.views.augmentations):
        if used.torchvision != version("torchvision"):
            raise RecipeError(
                f"{used.what} names torchvision {used.torchvision}, here is {version('torchvision')}. Fix: leave out "
                "torchvision_version, which is filled in"
            )
    opened = open_dataset(given)
    if len(opened.ids) == 0:
        raise RecipeError("the data set has no images")
    return opened


def as_given(recipe: PrecomputeRecipe, teachers: Mapping[str, nn.Module], dataset: object | None) -> PrecomputeRecipe:
    """Leave out of the recipe what objects took the place of: it did not make the cache.

    A recipe that names no teachers has those that are given, with the defaults of an entry.
    """
    named = recipe.teachers or {name: TeacherSource() for name in teachers}
    require_teachers(named)
    sources = {
        name: source.model_copy(update={"model": None}) if name in teachers else source
        for name, source in named.items()
    }
    entry = dataset if isinstance(dataset, Component) else None
    return recipe.model_copy(
        update={"teachers": sources, "dataset": recipe.dataset if dataset is None else entry},
    )


def require_teachers(named: Mapping[str, TeacherSource]) -> None:
    """Raise RecipeError if there are no teachers."""
    if not named:
        raise RecipeError("the recipe names no teachers. Fix: give `teachers:`, or pass the modules themselves")


def build_teachers(
    recipe: PrecomputeRecipe, given: Mapping[str, nn.Module], views: Views, device: torch.device
) -> list[Teacher]:
    """Build the recipe's teachers, around the modules that are given, for images such as those of the views."""
    unknown = sorted(given.keys() - recipe.teachers.keys())
    if unknown:
        raise RecipeError(f"teachers {unknown} were given, but the recipe names {sorted(recipe.teachers)}")
    key = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)[0]
    num_classes, pixels = views.dataset.num_classes, views[key]
    built = [
        build_teacher(
            name, source, given.get(name), num_classes, pixels.shape[0], device, outputs_of(name, source, views.dataset)
        )
        for name, source in recipe.teachers.items()
    ]
    for teacher in built:
        images = pixels.expand(2, *pixels.shape)
        with taking(teacher, images):
            teacher.decide_layouts(images)
    return built
