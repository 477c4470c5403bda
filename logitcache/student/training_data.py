"""What students learn from, opened once for all that share its batches."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from logitcache.cache.cache import Cache, open_uncompared
from logitcache.cache.pairs.record import Pairing, numbers_digest
from logitcache.cache.predicted_classes import predicted_classes
from logitcache.errors import RecipeError, TargetErrorWarning
from logitcache.runtime.console import logger
from logitcache.runtime.device import resolve_device
from logitcache.student.compatibility import asked_targets, held_teachers, inexact_targets
from logitcache.student.distributed.ranks import ALONE, Ranks
from logitcache.student.ensembles import Ensemble, with_ensembles
from logitcache.student.lesson import (
    Lesson,
    LiveTargets,
    begun_with,
    learned_images,
    lesson_of,
    lesson_of_images,
    num_grown,
    pairing_of,
    require_live,
    share_held_out,
    views_of,
)
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.targets import Batch
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.arranged import ArrangedImages
from logitcache.views.datasets.base import fingerprint, warn_of_orientation
from logitcache.views.epochs import EpochLoader, no_targets
from logitcache.views.keys import Ints
from logitcache.views.spec import Views


@dataclass(frozen=True)
class Stream:
    """Batches for all students of a group; `live` teachers answer in place of the `cache`.

    They answer the images that they `seen` of a pairing load, else the students' own.
    """

    loader: EpochLoader
    live: LiveTargets | None = None
    seen: EpochLoader | None = None
    num_live: int = 0
    ensembles: Mapping[str, Ensemble] = field(default_factory=dict)
    cache: str | None = None

    def batches(self, device: torch.device, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch on a device, from batch `start` on, with every teacher's answers."""
        seen = None if self.seen is None else self.seen.batches(self.loader.keys(epoch, start))
        for batch in self.loader.epoch(epoch, start):
            batch = batch if device.type == "cpu" else batch.to(device)
            if self.live is not None:
                shown = batch if seen is None else next(seen).to(device)
                batch = replace(batch, teachers=self.live(shown.images, shown.labels))
            yield with_ensembles(batch, self.ensembles)

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """Return the names of a model's classes, if those of the images are the same."""
        names = self.loader.views.dataset.class_names
        return names if names is not None and len(names) == num_classes else None


class TrainingData(Protocol):
    """What a recipe learns from, opened and checked before the first step."""

    def lesson(self, recipe: Any) -> Lesson:
        """Return the lesson of a recipe; raise if the recipe does not fit the data."""

    def identity(self, recipe: Any) -> dict[str, Any]:
        """Return what identifies the data that a recipe learns from."""

    def predicted_classes(self, recipe: Any, num_classes: int) -> tuple[str, ...] | None:
        """Return the names of the classes that the teachers of a recipe predict, if these are known and as many."""

    def stream(self, recipes: Sequence[Any], ranks: Ranks = ALONE) -> Stream:
        """Return the batches of recipes that share them; of several `ranks` each reads its part of every batch."""


@dataclass(frozen=True)
class CachedData:
    """A cache, with the teachers and views that its runs began with: it may have grown since."""

    cache: Cache
    num_views: int
    images: object | None
    live: LiveTargets | None = None
    pairing: Pairing | None = None
    absent: Ints | None = None

    @classmethod
    def open(
        cls, recipe: StudentRecipe, images: object | None, live: LiveTargets | None, begun: Mapping[str, Any]
    ) -> "CachedData":
        """Open the cache of a recipe; raise RecipeError for live teachers that it does not have."""
        cache = begun_with(open_uncompared(recipe.cache), begun)
        targets = cache.manifest.targets
        if not begun:
            require_live(recipe, cache)
        elif begun.get("teachers", list(targets)) != list(targets) and targets.keys() >= {*begun["teachers"]}:
            cache = cache.only({name: targets[name] for name in begun["teachers"]})  # without those that came later
        # Another cache may have fewer views: the identity differs then.
        num_views = min(begun.get("num_views", recipe.num_views or cache.num_views), cache.num_views)
        if not recipe.without:
            return cls(cache, num_views, images, live, pairing_of(recipe, cache))
        if recipe.pairing is not None or share_held_out(recipe) is not None:
            other = "validation.split" if recipe.pairing is None else "pairing"
            raise RecipeError(
                f"without leaves out images of the cache, which {other} takes. Fix: leave out one of both"
            )
        there = cache.open_images(images, recipe.trust, recipe.without)
        assert isinstance(there, ArrangedImages)
        logger.info(f"{len(there.absent)} images of {recipe.cache} are left out")
        return cls(cache, num_views, there, live, absent=there.absent)

    @cached_property
    def _held(self) -> Mapping[str, Any]:
        return held_teachers(self.cache)

    def lesson(self, recipe: StudentRecipe) -> Lesson:
        """Return the lesson of a student; raise if its losses do not fit the cache."""
        return lesson_of(recipe, self.cache, self.pairing, self.absent)

    def read_by(self, recipes: Sequence[StudentRecipe]) -> Cache:
        """Return the cache with the targets that losses ask for; nothing else is compared with its records, or read."""
        asked: dict[str, list[str]] = {}
        for recipe in recipes:
            for name, targets in asked_targets(recipe.losses, recipe.ensembles, self._held).items():
                asked[name] = [*dict.fromkeys([*asked.get(name, ()), *targets])]
        return self.cache.only(asked, self.num_views)

    def identity(self, recipe: StudentRecipe) -> dict[str, Any]:
        """Return what identifies the part of the cache that a student learns from."""
        return {
            "cache": self.read_by([recipe]).manifest.content_digest(),
            "num_views": self.num_views,
            "teachers": list(self.cache.manifest.teachers),
            "online": self.live is not None,
            **num_grown(self.cache),
            **({} if self.pairing is None else self.pairing.identity()),
            **({} if self.absent is None else {"without": numbers_digest(self.absent)}),
        }

    def predicted_classes(self, recipe: StudentRecipe, num_classes: int) -> tuple[str, ...] | None:
        """Return the names of the classes that the teachers of a student predict, if these are known and as many."""
        return predicted_classes(self.read_by([recipe]).manifest.teachers.values(), num_classes)

    def stream(self, recipes: Sequence[StudentRecipe], ranks: Ranks = ALONE) -> Stream:
        """Bind the cache to its images; raise unless they are those that the teacher saw."""
        first, cache = recipes[0], self.read_by(recipes)
        if self.live is not None and cache.manifest.views.targets == "linear":
            raise RecipeError(
                f"{first.cache} mixes the answers to two images (targets: linear), which no live teacher gives. "
                "Fix: leave out --online"
            )
        blocks = {self.read_by([recipe]).shuffle_block for recipe in recipes}
        assert len(blocks) == 1, "each student alone would see another order"
        loader = _loader(
            first,
            views_of(cache, self.images, first, first.replay, self.pairing),
            ranks,
            targets_of=cache.rows if self.live is None else no_targets,
            checksums_of=cache.checksums_of(first.verify) if self.pairing is None else None,
            images=learned_images(first, cache, self.pairing, self.absent),
            shuffle_block=blocks.pop(),
        )
        if self.live is not None:
            seen = None if self.pairing is None else self._seen(first, cache, ranks)
            return Stream(loader, self.live, seen, len(self.cache.manifest.teachers), first.ensembles)
        if ranks.is_first:
            inexact = (reason for one in recipes for reason in inexact_targets(one.losses, one.ensembles, self.cache))
            for reason in dict.fromkeys(inexact):
                warnings.warn(reason, TargetErrorWarning, stacklevel=2)
        return Stream(loader, ensembles=first.ensembles, cache=first.cache)

    def _seen(self, recipe: StudentRecipe, cache: Cache, ranks: Ranks) -> EpochLoader:
        """Load the teacher's own images beside the paired ones."""
        views = views_of(cache, recipe.teacher_dataset, recipe, recipe.replay)
        return _loader(recipe, views, ranks, checksums_of=cache.checksums_of(recipe.verify))


@dataclass(frozen=True)
class LabelledData:
    """Images with labels, of which every epoch renders a fresh view."""

    views: Views

    @classmethod
    def open(cls, recipe: TeacherRecipe, images: object, begun: Mapping[str, Any]) -> "LabelledData":
        """Open the data set; a run that has begun keeps the plan of its views."""
        dataset, spec = open_dataset(images), recipe.views()
        warn_of_orientation(dataset)
        if begun:  # runs of the first plan do not record it
            spec = spec.model_copy(update={"plan_version": begun.get("plan_version", 1)})
        return cls(Views(dataset, spec))

    def lesson(self, recipe: TeacherRecipe) -> Lesson:
        """Return the lesson of a model; raise RecipeError if its losses do not fit the labels."""
        return lesson_of_images(recipe, self.views)

    def identity(self, recipe: TeacherRecipe) -> dict[str, Any]:
        """Return what identifies the images."""
        version = self.views.spec.plan_version
        images = fingerprint(self.views.dataset).model_dump(mode="json")
        return {"dataset": images} | ({"plan_version": version} if version > 1 else {})

    def predicted_classes(self, recipe: TeacherRecipe, num_classes: int) -> tuple[str, ...] | None:
        """Return None: no teacher answers."""
        return None

    def stream(self, recipes: Sequence[TeacherRecipe], ranks: Ranks = ALONE) -> Stream:
        """Return the batches."""
        return Stream(_loader(recipes[0], self.views, ranks))


def open_training_data(
    recipe: StudentRecipe | TeacherRecipe,
    live: LiveTargets | None = None,
    begun: Mapping[str, Any] | None = None,
    dataset: object | None = None,
) -> TrainingData:
    """Open what a recipe learns from: a cache, or labelled images; `dataset` takes the place of its entry.

    `begun` is the identity of the data that the run began with.
    """
    images = recipe.dataset if dataset is None else dataset
    if isinstance(recipe, StudentRecipe):
        return CachedData.open(recipe, images, live, begun or {})
    return LabelledData.open(recipe, images, begun or {})


def _loader(recipe: StudentRecipe | TeacherRecipe, views: Views, ranks: Ranks, **options: Any) -> EpochLoader:
    return EpochLoader(
        views,
        batch_size=recipe.batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed if recipe.order_seed is None else recipe.order_seed,
        drop_last=recipe.drop_last,
        views_per_image=recipe.views_per_image,
        sampling=recipe.sampling,
        start_method=recipe.start_method,
        device=resolve_device(recipe.device),
        rank=ranks.rank,
        world_size=ranks.size,
        **options,
    )
