"""The inputs of `precompute`, opened: the store of the cache, the images and their views, and the teachers."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn

from logitcache.cache.format.root import ROOT, read_manifest
from logitcache.cache.image_order import images_to_answer
from logitcache.cache.snapshot import locate
from logitcache.config.recipe import Component, require_effect
from logitcache.errors import RecipeError
from logitcache.runtime.device import resolve_device
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
from logitcache.views.view_sizes import require_one_size


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a recipe; `recipe` has no entries for objects that the caller passed instead."""

    recipe: PrecomputeRecipe
    store: Store
    views: Views
    teachers: list[Teacher]

    @property
    def device(self) -> torch.device:
        """The device of the teachers."""
        return self.teachers[0].device

    @property
    def passes(self) -> int:
        """Number of images that the networks of the teachers have processed."""
        return sum(teacher.passes for teacher in self.teachers)

    def leave_device(self) -> None:
        """Free the memory of the device for the workers of a cluster."""
        for teacher in self.teachers:
            teacher.cpu()
        torch.cuda.empty_cache()


def open_views(
    recipe: PrecomputeRecipe, teachers: Mapping[str, nn.Module], dataset: object | None
) -> tuple[PrecomputeRecipe, Store, Views]:
    """Open the store and the images of a recipe, or `dataset` in their place; also returns the recipe to record."""
    store = locate(recipe.cache)
    recipe = _without_objects(_as_recorded(recipe, store), teachers, dataset)
    images = _open_images(recipe, dataset)
    if (store.path / ROOT).is_file():
        images = images_to_answer(store, images, appends=recipe.new_images == "append")
    return recipe, store, Views(images, recipe.views)


@contextlib.contextmanager
def with_teachers(
    recipe: PrecomputeRecipe, store: Store, views: Views, given: Mapping[str, nn.Module]
) -> Iterator[Inputs]:
    """Build the teachers, and remove their hooks afterwards: the networks may be the caller's."""
    built = _build_teachers(recipe, given, views, resolve_device(recipe.device))
    try:
        yield Inputs(recipe, store, views, built)
    finally:
        for teacher in built:
            teacher.remove_taps()


def open_inputs(
    recipe: PrecomputeRecipe, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> contextlib.AbstractContextManager[Inputs]:
    """Open the inputs of a recipe; `teachers` and `dataset` are objects that replace its entries."""
    resolve_device(recipe.device)  # raises before anything is opened
    opened = open_views(recipe, teachers or {}, dataset)
    require_one_size(opened[-1])  # names a wrong image before any is decoded
    return with_teachers(*opened, teachers or {})


def _as_recorded(recipe: PrecomputeRecipe, store: Store) -> PrecomputeRecipe:
    """Plan views as the existing cache does, unless the recipe names another plan version.

    Raises RecipeError for options without effect if the cache is new.
    """
    if not (store.path / ROOT).is_file():
        require_effect(recipe)
        return recipe
    if "plan_version" in recipe.views.model_fields_set:
        return recipe
    views = recipe.views.model_copy(update={"plan_version": read_manifest(store).views.plan_version})
    return recipe.model_copy(update={"views": views})


def _open_images(recipe: PrecomputeRecipe, dataset: object | None) -> ImageDataset:
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


def _without_objects(
    recipe: PrecomputeRecipe, teachers: Mapping[str, nn.Module], dataset: object | None
) -> PrecomputeRecipe:
    """Remove the entries that the caller's objects replace: they did not make the cache.

    A recipe without teachers takes default entries for the teachers that were passed.
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
    """Raise RecipeError for a recipe without teachers."""
    if not named:
        raise RecipeError("the recipe names no teachers. Fix: give `teachers:`, or pass the modules themselves")


def _build_teachers(
    recipe: PrecomputeRecipe, given: Mapping[str, nn.Module], views: Views, device: torch.device
) -> list[Teacher]:
    """Build the teachers of the recipe, around the caller's modules if passed, for the shape of the views."""
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
