"""What a run learns from, opened and checked before the first step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logitcache.cache.manifest import Manifest
from logitcache.cache.reader import Cache, Replay, open_cache
from logitcache.errors import MismatchError, RecipeError
from logitcache.student.compatibility import asks_teacher, require_served
from logitcache.student.losses import Loss
from logitcache.student.recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.targets import Targets
from logitcache.views.datasets import fingerprint, open_dataset
from logitcache.views.epochs import EpochLoader, no_targets
from logitcache.views.spec import Views, require_one_size

LiveTargets = Callable[[Tensor], Mapping[str, Targets]]


@dataclass(frozen=True)
class Source:
    """Batches, the number of classes, and what identifies them; `live` teachers answer in place of the cache."""

    loader: EpochLoader
    num_classes: int
    identity: dict[str, Any]
    live: LiveTargets | None = None
    num_live: int = 0


def open_source(
    recipe: StudentRecipe | TeacherRecipe, live: LiveTargets | None, begun: Mapping[str, Any] | None = None
) -> Source:
    """Open what a recipe learns from; raises where images, cache and losses do not belong together.

    `begun` is the identity of the source that the run began with: a cache may have grown since.
    """
    return _from_cache(recipe, live, begun or {}) if isinstance(recipe, StudentRecipe) else _from_labels(recipe)


def views_of(cache: Cache, dataset: object, recipe: TrainingRecipe, replay: Replay = "planned") -> Views:
    """Bind a cache's views to its images, as exactly as a recipe asks."""
    return cache.views(dataset, recipe.verify, limits=recipe.drift_limits, replay=replay, factories=recipe.factories)


def _from_cache(recipe: StudentRecipe, live: LiveTargets | None, begun: Mapping[str, Any]) -> Source:
    cache = _as_begun(open_cache(recipe.cache), recipe.num_views, begun)
    require_served(recipe.losses, cache)
    if live is not None and cache.manifest.views.targets == "linear":
        raise RecipeError(
            f"{recipe.cache} mixes the answers to two images (targets: linear), which no live teacher gives. "
            "Fix: leave out --online"
        )
    views = views_of(cache, recipe.dataset, recipe, recipe.replay)
    loader = _loader(
        recipe,
        views,
        targets_of=cache.rows if live is None else no_targets,
        checksums_of=cache.checksums_of(recipe.verify),
        shuffle_block=cache.shuffle_block,
    )
    names = list(cache.manifest.teachers)
    identity = {
        "cache": cache.manifest.content_digest(),
        "num_views": cache.num_views,
        "teachers": names,
        "online": live is not None,
    }
    return Source(
        loader,
        _num_classes(recipe.losses, cache.manifest),
        identity,
        None if live is None else _only(live, names),
        0 if live is None else len(names),
    )


def _as_begun(cache: Cache, num_views: int | None, begun: Mapping[str, Any]) -> Cache:
    """Return a cache as it was when the run began, or as a run that begins now sees it: with the first views."""
    manifest = cache.manifest
    if num_views is not None and num_views > cache.num_views:
        raise RecipeError(f"num_views is {num_views}, {cache.path} has {cache.num_views} views. Fix: at most these")
    views, names = begun.get("num_views", num_views or cache.num_views), begun.get("teachers", list(manifest.teachers))
    if views > cache.num_views or not set(names) <= manifest.teachers.keys():
        return cache  # another one: its identity differs
    return Cache(cache.path, manifest.restricted(views, names))


def _only(live: LiveTargets, names: Sequence[str]) -> LiveTargets:
    def answers(images: Tensor) -> Mapping[str, Targets]:
        found = live(images)
        return {name: found[name] for name in names}

    return answers


def _from_labels(recipe: TeacherRecipe) -> Source:
    dataset = open_dataset(recipe.dataset)
    if dataset.num_classes is None:
        raise RecipeError(
            "the data set has no labels to learn from. Fix: name one with labels, or train a student from a cache"
        )
    views = Views(dataset, recipe.views())
    require_one_size(views)
    loader = _loader(recipe, views)
    return Source(loader, dataset.num_classes, {"dataset": fingerprint(dataset).model_dump(mode="json")})


def _loader(recipe: StudentRecipe | TeacherRecipe, views: Views, **options: Any) -> EpochLoader:
    return EpochLoader(
        views,
        batch_size=recipe.batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed,
        drop_last=recipe.drop_last,
        views_per_image=recipe.views_per_image,
        start_method=recipe.start_method,
        **options,
    )


def _num_classes(losses: Sequence[Loss], manifest: Manifest) -> int:
    """Return the number of classes of the teachers that the losses ask, of the first where they ask none."""
    first = next(iter(manifest.teachers))
    asked = [loss.teacher or first for loss in losses if asks_teacher(loss)] or [first]
    counts = {name: manifest.teachers[name].num_classes for name in asked}
    if len(set(counts.values())) > 1:
        raise MismatchError(
            f"one student cannot learn from teachers of different numbers of classes: {counts}. "
            "Fix: losses whose teachers predict the same classes"
        )
    return counts[asked[0]]
