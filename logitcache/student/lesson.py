"""The targets and images of a training, and the checks that recipe, cache and images belong together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from logitcache.cache.cache import Cache, Replay
from logitcache.cache.pairs.record import Pairing
from logitcache.config.recipe import Component
from logitcache.errors import MismatchError, RecipeError, caught, raise_all
from logitcache.student.compatibility import (
    FROM_LABELS,
    held_teachers,
    require_batch_rows,
    require_labels,
    require_served,
    require_softmax_classes,
    shares_classes,
)
from logitcache.student.ensembles import num_classes_of
from logitcache.student.losses import Loss
from logitcache.student.losses.base import HeldTeacher
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.targets import Targets
from logitcache.views.datasets.base import Labels, is_multi_label
from logitcache.views.datasets.images.labels import class_counts
from logitcache.views.keys import Ints, ViewKey
from logitcache.views.order import held_out
from logitcache.views.spec import Views
from logitcache.views.view_sizes import require_one_size

NUM_LABELS = 64
R = TypeVar("R", bound=TrainingRecipe)
LiveTargets = Callable[[Tensor, Tensor], Mapping[str, Targets]]


def as_given(recipe: R, dataset: object | None, model: nn.Module | None) -> R:
    """Remove the entries of a recipe that the caller's objects replace: they did not make the run.

    Raises RecipeError if both the entry and the object are missing.
    """
    recipe.require_entries([key for key, value in {"dataset": dataset, "model": model}.items() if value is not None])
    images = {} if dataset is None else {"dataset": dataset if isinstance(dataset, Component) else None}
    return recipe.model_copy(update=images | ({} if model is None else {"model": None}))


@dataclass(frozen=True)
class Lesson:
    """Everything that a model must fit: classes, images uint8 [C, H, W], teachers, and the number of training images.

    class_counts: labelled images of each class, int64 [C]; labels: labels of the first images; mixes: whether images
    are mixed with partners.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    num_images: int
    class_counts: Tensor
    labels: Labels
    mixes: bool
    teachers: Mapping[str, HeldTeacher] = field(default_factory=dict)


def begun_with(cache: Cache, identity: Mapping[str, Any]) -> Cache:
    """Restrict a cache to the images that a run began with, by its identity; a new run takes all."""
    if not identity or cache.manifest.appended is None:
        return cache
    return cache.first(identity.get("num_images", cache.manifest.first.num_images))


def num_grown(cache: Cache) -> dict[str, int]:
    """Return the number of images as an entry of a run's identity; empty if none were appended."""
    return {"num_images": len(cache)} if len(cache) > cache.manifest.first.num_images else {}


def pairing_of(recipe: StudentRecipe, cache: Cache) -> Pairing | None:
    """Read the pairing of a recipe; None if the student learns from the teacher's images."""
    return None if recipe.pairing is None else cache.pairing(recipe.pairing, shuffled=recipe.shuffled)


def views_of(
    cache: Cache,
    dataset: object,
    recipe: TrainingRecipe,
    replay: Replay = "planned",
    pairing: Pairing | None = None,
) -> Views:
    """Bind a cache's views to its images, or to paired ones, and verify them at the level of the recipe.

    Images that the recipe excludes are absent.
    """
    if isinstance(recipe, StudentRecipe) and recipe.without:
        dataset = cache.open_images(dataset, recipe.trust, recipe.without)
    return cache.views(
        dataset,
        recipe.verify,
        limits=recipe.drift_limits,
        replay=replay,
        factories=recipe.factories,
        trust=recipe.trust,
        pairing=pairing,
    )


def lesson_of(
    recipe: StudentRecipe, cache: Cache, pairing: Pairing | None = None, absent: Ints | None = None
) -> Lesson:
    """Return the lesson of a cache; raises if the cache, the losses and the ensembles do not fit together.

    `absent` are the excluded images.
    """
    held, labels = held_teachers(cache), learned_labels(recipe, cache, pairing, absent)
    raise_all(
        caught(
            lambda: _classes_of(recipe, cache, held),
            lambda: require_served(recipe.losses, cache, recipe.ensembles),
            lambda: require_batch_rows(recipe.losses, len(labels), recipe.batch_size, recipe.drop_last),
            lambda: _require_views(recipe, cache),
        )
    )
    classes = _classes_of(recipe, cache, held)
    num_classes = _num_classes(recipe.losses, classes, cache.manifest.fingerprint.num_classes)
    require_softmax_classes(recipe.losses, num_classes, f"{cache.location}: ")
    counts = torch.from_numpy(class_counts(labels, num_classes))
    first, mixes = labels[:NUM_LABELS].copy(), bool(cache.manifest.views.mixing)
    shape = cache.manifest.image_shape if pairing is None else pairing.record.image_shape
    return Lesson(num_classes, shape, len(labels), counts, first, mixes, held)


def share_held_out(recipe: TrainingRecipe) -> float | None:
    """Return the fraction of the images that is held out for validation."""
    return None if recipe.validation is None else recipe.validation.split


def learned_images(
    recipe: StudentRecipe, cache: Cache, pairing: Pairing | None, absent: Ints | None = None
) -> Ints | None:
    """Return the indices of the training images; None for all.

    Raises RecipeError if the split holds out none or all, or if a loss stores rows of held-out images.
    """
    share, matched = share_held_out(recipe), None if pairing is None else pairing.matched
    if absent is not None:
        if cache.manifest.views.mixing:
            raise RecipeError(
                f"without: {cache.location} mixes each image with another, which needs both. Fix: put the images back"
            )
        matched = np.setdiff1d(np.arange(len(cache)), absent)
        if not len(matched):
            raise RecipeError(f"without: no image of {cache.location} is left. Fix: name their place by `dataset:`")
    if share is None and matched is None:
        return None
    if lasting := [loss.kind for loss in recipe.losses if loss.remembers_rows]:
        fix = "pairs of all images" if absent is None else "put the images back"
        fix = "leave out validation.split" if share is not None else fix
        raise RecipeError(f"{lasting} remember every image, left out or not. Fix: {fix}")
    if share is None:
        return matched
    held = held_out(len(cache), share)
    there = np.arange(len(cache)) if matched is None else matched
    learned = there[~held[there]]
    if len(learned) in (0, len(there)):
        raise RecipeError(
            f"validation.split {share:g} holds out {len(there) - len(learned)} of {len(there)} images. "
            "Fix: another share"
        )
    return learned


def learned_labels(recipe: StudentRecipe, cache: Cache, pairing: Pairing | None, absent: Ints | None = None) -> Labels:
    """Return the labels of the training images. Raises as `learned_images`."""
    every = cache.labels if pairing is None else cache.labels[pairing.sources]
    learned = learned_images(recipe, cache, pairing, absent)
    return every if learned is None else every[learned]


def _classes_of(recipe: StudentRecipe, cache: Cache, held: Mapping[str, HeldTeacher]) -> dict[str, int]:
    """Return the number of classes of the teachers and ensembles that have logits."""
    classes = {name: teacher.num_classes for name, teacher in held.items() if teacher.num_classes is not None}
    labelled = bool((cache.labels >= 0).any()) and not is_multi_label(cache.labels)
    return num_classes_of(recipe.ensembles, classes, labelled)


def require_live(recipe: StudentRecipe, cache: Cache) -> None:
    """Raise RecipeError for live teachers that are not in the cache."""
    known = sorted(cache.manifest.teachers)
    if unknown := sorted(recipe.teachers.keys() - cache.manifest.teachers.keys()):
        raise RecipeError(f"teachers: {unknown} are none of {cache.location}, which has {known}. Fix: name these")


def _require_views(recipe: StudentRecipe, cache: Cache) -> None:
    if recipe.num_views is not None and recipe.num_views > cache.num_views:
        raise RecipeError(
            f"num_views is {recipe.num_views}, {cache.location} has {cache.num_views} views. Fix: at most these"
        )


def lesson_of_images(recipe: TeacherRecipe, views: Views) -> Lesson:
    """Return the lesson of labelled images; raises RecipeError if the images and the losses do not fit together."""
    dataset = views.dataset
    if share_held_out(recipe) is not None:
        raise RecipeError("validation.split holds out images of a cache, and there is none. Fix: validation.dataset")
    if dataset.num_classes is None:
        raise RecipeError(
            "the data set has no labels to learn from. Fix: name one with labels, or train a student from a cache"
        )
    require_labels(recipe.losses, dataset.labels)
    require_softmax_classes(recipe.losses, dataset.num_classes)
    require_one_size(views)
    counts = torch.from_numpy(class_counts(dataset.labels, dataset.num_classes))
    shape, first = tuple(views[ViewKey(0, 0)].shape), dataset.labels[:NUM_LABELS].copy()
    return Lesson(dataset.num_classes, shape, len(dataset.ids), counts, first, bool(recipe.mixing))


def _num_classes(losses: Sequence[Loss], classes: Mapping[str, int], labelled: int | None) -> int:
    """Return the number of classes of the teachers whose logits the losses compare with the student's.

    Without such losses, the number of classes of the labels if a loss uses them, else of the first teacher.
    """
    first = next(iter(classes), None)
    asked = [loss.teacher or first for loss in losses if shares_classes(loss)]
    counts = {name: classes[name] for name in asked if name is not None}
    if len(set(counts.values())) > 1:
        raise MismatchError(
            f"one student cannot learn from teachers of different numbers of classes: {counts}. "
            "Fix: losses whose teachers predict the same classes"
        )
    of_labels = any(loss.needs & FROM_LABELS for loss in losses)
    found = next(iter(counts.values()), labelled if of_labels else classes.get(first or "", labelled))
    if found is None:
        raise RecipeError("the number of classes is unknown. Fix: a loss on labels, or on logits")
    return found
