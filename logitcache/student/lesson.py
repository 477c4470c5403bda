"""What a run learns from, opened and checked before the first step."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from logitcache.cache.cache import Cache, Replay, open_uncompared
from logitcache.config.recipe import Component
from logitcache.errors import MismatchError, RecipeError, TargetErrorWarning, caught, raise_all
from logitcache.student.compatibility import (
    FROM_LABELS,
    asked_targets,
    held_teachers,
    inexact_targets,
    require_classes,
    require_labels,
    require_rows,
    require_served,
    shares_classes,
)
from logitcache.student.ensembles import Ensemble, classes_of
from logitcache.student.losses import Loss
from logitcache.student.losses.base import HeldTeacher
from logitcache.student.ranks import ALONE, Ranks
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.targets import Targets
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.base import Labels, fingerprint, is_multi_label, warn_of_orientation
from logitcache.views.datasets.images.labels import class_counts
from logitcache.views.epochs import EpochLoader, no_targets
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, require_one_size

NUM_LABELS = 64
R = TypeVar("R", bound=TrainingRecipe)
LiveTargets = Callable[[Tensor, Tensor], Mapping[str, Targets]]


def as_given(recipe: R, dataset: object | None, model: nn.Module | None) -> R:
    """Leave out of a recipe what objects took the place of: it did not make the run.

    Raises RecipeError if there is neither an entry nor an object.
    """
    recipe.require_entries([key for key, value in {"dataset": dataset, "model": model}.items() if value is not None])
    images = {} if dataset is None else {"dataset": dataset if isinstance(dataset, Component) else None}
    return recipe.model_copy(update=images | ({} if model is None else {"model": None}))


@dataclass(frozen=True)
class Lesson:
    """What a model is to fit: classes, images uint8 [C, H, W], teachers, and how many images there are to learn from.

    class_counts: labelled images of each class, int64 [C]; labels: those of the first images; mixes: whether images are
    mixed with partners.
    """

    num_classes: int
    image_shape: tuple[int, ...]
    num_images: int
    class_counts: Tensor
    labels: Labels
    mixes: bool
    teachers: Mapping[str, HeldTeacher] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """Batches, what they ask of a model, and what identifies them; `live` teachers answer in place of the `cache`."""

    loader: EpochLoader
    lesson: Lesson
    identity: dict[str, Any]
    live: LiveTargets | None = None
    num_live: int = 0
    ensembles: Mapping[str, Ensemble] = field(default_factory=dict)
    cache: str | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the model's classes, if those of the images are the same."""
        names = self.loader.views.dataset.class_names
        return names if names is not None and len(names) == self.lesson.num_classes else None


def open_training_data(
    recipe: StudentRecipe | TeacherRecipe,
    live: LiveTargets | None,
    begun: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    dataset: object | None = None,
) -> TrainingData:
    """Open what a recipe learns from, or a data set in place of its entry.

    Raises if images, cache and losses do not belong together. `begun` is the identity of the data that the run began
    with: a cache may have grown since. Of several `ranks` each reads its part of every batch.
    """
    images = recipe.dataset if dataset is None else dataset
    if isinstance(recipe, StudentRecipe):
        return _open_cache(recipe, images, live, begun or {}, ranks)
    return _open_labels(recipe, images, begun or {}, ranks)


def views_of(cache: Cache, dataset: object, recipe: TrainingRecipe, replay: Replay = "planned") -> Views:
    """Bind a cache's views to its images, as exactly as a recipe asks."""
    return cache.views(
        dataset,
        recipe.verify,
        limits=recipe.drift_limits,
        replay=replay,
        factories=recipe.factories,
        trust=recipe.trust,
    )


def _open_cache(
    recipe: StudentRecipe, images: object | None, live: LiveTargets | None, begun: Mapping[str, Any], ranks: Ranks
) -> TrainingData:
    cache = open_uncompared(recipe.cache)
    targets = cache.manifest.targets
    if not begun:
        require_live(recipe, cache)
    elif begun.get("teachers", list(targets)) != list(targets) and targets.keys() >= {*begun["teachers"]}:
        cache = cache.only({name: targets[name] for name in begun["teachers"]})  # without those that came later
    teachers, lesson = list(cache.manifest.teachers), lesson_of(recipe, cache)
    # Nothing else is compared with its records, or read. Another cache may have fewer views: the identity differs then.
    asked = asked_targets(recipe.losses, recipe.ensembles, lesson.teachers)
    cache = cache.only(asked, min(begun.get("num_views", recipe.num_views or cache.num_views), cache.num_views))
    if live is not None and cache.manifest.views.targets == "linear":
        raise RecipeError(
            f"{recipe.cache} mixes the answers to two images (targets: linear), which no live teacher gives. "
            "Fix: leave out --online"
        )
    loader = _loader(
        recipe,
        views_of(cache, images, recipe, recipe.replay),
        ranks,
        targets_of=cache.rows if live is None else no_targets,
        checksums_of=cache.checksums_of(recipe.verify),
        shuffle_block=cache.shuffle_block,
    )
    identity = {
        "cache": cache.manifest.content_digest(),
        "num_views": cache.num_views,
        "teachers": teachers,
        "online": live is not None,
    }
    if live is not None:
        return TrainingData(loader, lesson, identity, live, len(cache.manifest.teachers), recipe.ensembles)
    for reason in inexact_targets(recipe.losses, recipe.ensembles, cache) if ranks.is_first else ():
        warnings.warn(reason, TargetErrorWarning, stacklevel=2)
    return TrainingData(loader, lesson, identity, ensembles=recipe.ensembles, cache=recipe.cache)


def lesson_of(recipe: StudentRecipe, cache: Cache) -> Lesson:
    """Return what a cache asks of a student; raises if it, the losses and the ensembles do not belong together."""
    held = held_teachers(cache)
    raise_all(
        caught(
            lambda: _classes_of(recipe, cache, held),
            lambda: require_served(recipe.losses, cache, recipe.ensembles),
            lambda: require_rows(recipe.losses, len(cache), recipe.batch_size, recipe.drop_last),
            lambda: _require_views(recipe, cache),
        )
    )
    classes = _classes_of(recipe, cache, held)
    num_classes = _num_classes(recipe.losses, classes, cache.manifest.fingerprint.num_classes)
    require_classes(recipe.losses, num_classes, f"{cache.location}: ")
    counts = torch.from_numpy(class_counts(cache.labels, num_classes))
    first, mixes = cache.labels[:NUM_LABELS].copy(), bool(cache.manifest.views.mixing)
    return Lesson(num_classes, cache.manifest.image_shape, len(cache), counts, first, mixes, held)


def _classes_of(recipe: StudentRecipe, cache: Cache, held: Mapping[str, HeldTeacher]) -> dict[str, int]:
    """Return the number of classes of the teachers and ensembles that have logits."""
    classes = {name: teacher.num_classes for name, teacher in held.items() if teacher.num_classes is not None}
    labelled = bool((cache.labels >= 0).any()) and not is_multi_label(cache.labels)
    return classes_of(recipe.ensembles, classes, labelled)


def require_live(recipe: StudentRecipe, cache: Cache) -> None:
    """Raise RecipeError for live teachers that the cache does not have."""
    known = sorted(cache.manifest.teachers)
    if unknown := sorted(recipe.teachers.keys() - cache.manifest.teachers.keys()):
        raise RecipeError(f"teachers: {unknown} are none of {cache.location}, which has {known}. Fix: name these")


def _require_views(recipe: StudentRecipe, cache: Cache) -> None:
    if recipe.num_views is not None and recipe.num_views > cache.num_views:
        raise RecipeError(
            f"num_views is {recipe.num_views}, {cache.location} has {cache.num_views} views. Fix: at most these"
        )


def _open_labels(recipe: TeacherRecipe, images: object, begun: Mapping[str, Any], ranks: Ranks) -> TrainingData:
    dataset, spec = open_dataset(images), recipe.views()
    warn_of_orientation(dataset)
    if begun:  # runs of the first plan do not record it
        spec = spec.model_copy(update={"plan_version": begun.get("plan_version", 1)})
    views = Views(dataset, spec)
    lesson = lesson_of_images(recipe, views)
    identity: dict[str, Any] = {"dataset": fingerprint(dataset).model_dump(mode="json")}
    identity |= {"plan_version": spec.plan_version} if spec.plan_version > 1 else {}
    return TrainingData(_loader(recipe, views, ranks), lesson, identity)


def lesson_of_images(recipe: TeacherRecipe, views: Views) -> Lesson:
    """Return what labelled images ask of a model; raises RecipeError if they and the losses do not belong together."""
    dataset = views.dataset
    if dataset.num_classes is None:
        raise RecipeError(
            "the data set has no labels to learn from. Fix: name one with labels, or train a student from a cache"
        )
    require_labels(recipe.losses, dataset.labels)
    require_classes(recipe.losses, dataset.num_classes)
    require_one_size(views)
    counts = torch.from_numpy(class_counts(dataset.labels, dataset.num_classes))
    shape, first = tuple(views[ViewKey(0, 0)].shape), dataset.labels[:NUM_LABELS].copy()
    return Lesson(dataset.num_classes, shape, len(dataset.ids), counts, first, bool(recipe.mixing))


def _loader(recipe: StudentRecipe | TeacherRecipe, views: Views, ranks: Ranks, **options: Any) -> EpochLoader:
    return EpochLoader(
        views,
        batch_size=recipe.batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed,
        drop_last=recipe.drop_last,
        views_per_image=recipe.views_per_image,
        sampling=recipe.sampling,
        start_method=recipe.start_method,
        rank=ranks.rank,
        world_size=ranks.size,
        **options,
    )


def _num_classes(losses: Sequence[Loss], classes: Mapping[str, int], labelled: int | None) -> int:
    """Return the number of classes of the teachers whose logits the losses compare with the student's.

    Where there are none it is that of the labels, if a loss takes them, or else of the first teacher.
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
