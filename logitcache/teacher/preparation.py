"""Before the first shard: open what the recipe names, then create its cache or prove that it is the one to continue."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from logitcache.cache.create import create_skeleton, read_manifest
from logitcache.cache.layout import Layout, Shard, choose_shard_rows, layout_of
from logitcache.cache.manifest import Manifest, TeacherEntry, require_same
from logitcache.cache.reader import Cache
from logitcache.cache.skeleton import Samples, mend_skeleton
from logitcache.cache.unreadable import forget_unreadable, with_mended_images
from logitcache.cache.verify import damaged
from logitcache.console import say
from logitcache.device import to_device
from logitcache.errors import MismatchError, RecipeError
from logitcache.files import remove_leftovers
from logitcache.models import weights_digest
from logitcache.recipe import Component
from logitcache.teacher.models import Teacher, TeacherSource, build_teacher
from logitcache.teacher.recipes import PrecomputeRecipe
from logitcache.versions import versions
from logitcache.views import canaries
from logitcache.views.datasets import fingerprint, open_dataset
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


def open_images(recipe: PrecomputeRecipe, dataset: object | None) -> ImageDataset:
    """Open the images of the recipe, or those passed in their place."""
    given = recipe.dataset if dataset is None else dataset
    if given is None:
        raise RecipeError("the recipe names no data set. Fix: give `dataset:`, or pass the data set itself")
    opened = open_dataset(given)
    if len(opened.ids) == 0:
        raise RecipeError("the data set has no images")
    return opened


def as_given(recipe: PrecomputeRecipe, teachers: Mapping[str, nn.Module], dataset: object | None) -> PrecomputeRecipe:
    """Leave out of the recipe what objects took the place of: it did not make the cache."""
    sources = {
        name: source.model_copy(update={"model": None}) if name in teachers else source
        for name, source in recipe.teachers.items()
    }
    entry = dataset if isinstance(dataset, Component) else None
    return recipe.model_copy(
        update={"teachers": sources, "dataset": recipe.dataset if dataset is None else entry},
    )


def build_teachers(
    recipe: PrecomputeRecipe, given: Mapping[str, nn.Module], views: Views, key: ViewKey, device: torch.device
) -> list[Teacher]:
    """Build the recipe's teachers, around the modules that are given, for images such as that of `key`."""
    unknown = sorted(given.keys() - recipe.teachers.keys())
    if unknown:
        raise RecipeError(f"teachers {unknown} were given, but the recipe names {sorted(recipe.teachers)}")
    num_classes, channels = views.dataset.num_classes, views[key].shape[0]
    return [
        build_teacher(name, source, given.get(name), num_classes, channels, device)
        for name, source in recipe.teachers.items()
    ]


def prepare(
    recipe: PrecomputeRecipe, views: Views, keys: list[ViewKey], teachers: list[Teacher], target: Path, path: Path
) -> tuple[Layout, list[Shard]]:
    """Create the cache, or prove that the recipe is the one that made it; returns the shards that are still to do."""
    records, pixels = canaries.take(views, keys)
    samples = Samples(views.dataset.labels, views.dataset.digests(), pixels.numpy())
    entries = {t.name: _entry(recipe.teachers[t.name], t, views.dataset, pixels) for t in teachers}
    if target == path:
        recorded = read_manifest(path)
        rows = recipe.shard_rows or recorded.shard_rows
        return _continue(path, recorded, _manifest(recipe, views, entries, records, pixels, rows), views, samples)
    rows = choose_shard_rows(list(entries.values()), len(views.dataset.ids), recipe.shard_rows)
    manifest = _manifest(recipe, views, entries, records, pixels, rows)
    create_skeleton(target, path, manifest, samples)
    return layout_of(manifest), list(layout_of(manifest).shards())


def _continue(
    path: Path, recorded: Manifest, wanted: Manifest, views: Views, samples: Samples
) -> tuple[Layout, list[Shard]]:
    """Refuse another recipe than the one that made the cache; mend what is damaged of all but the shards."""
    done = Cache(path, recorded).shards
    manifest = with_mended_images(path, recorded, wanted, samples.digests, done)
    cache = Cache(path, manifest)
    cache.require_dataset(views.dataset)
    require_same(manifest, wanted, str(path))
    if manifest.canaries != wanted.canaries:
        cache.require_canaries(views)
    for key in mend_skeleton(path, recorded, manifest, samples):
        say(f"writing again: {path / key}")
    forget_unreadable(path)
    remove_leftovers(path)
    return cache.layout, _unfinished(path, cache)


def _manifest(
    recipe: PrecomputeRecipe,
    views: Views,
    entries: dict[str, TeacherEntry],
    records: tuple[canaries.Canary, ...],
    pixels: Tensor,
    shard_rows: int,
) -> Manifest:
    return Manifest(
        dataset=recipe.dataset,
        fingerprint=fingerprint(views.dataset),
        views=recipe.views,
        image_shape=(pixels.shape[1], pixels.shape[2], pixels.shape[3]),
        shard_rows=shard_rows,
        row_checksums=recipe.row_checksums,
        parameters=recipe.views.columns() if recipe.record_parameters else None,
        teachers=entries,
        canaries=records,
        versions=versions(),
    )


def _entry(source: TeacherSource, teacher: Teacher, dataset: ImageDataset, pixels: Tensor) -> TeacherEntry:
    logits = teacher(to_device(pixels, teacher.device)).logits
    assert isinstance(logits, Tensor)
    num_classes = logits.shape[1]
    if dataset.num_classes not in (None, num_classes):
        raise MismatchError(
            f"teacher {teacher.name!r} predicts {num_classes} classes, the data set has {dataset.num_classes}.\n"
            f"  Fix: point teachers.{teacher.name}.model at a checkpoint fine-tuned on these classes, or read "
            "the images without labels"
        )
    return TeacherEntry(
        model=source.model.model_dump(mode="json") if source.model else None,
        weights=weights_digest(teacher.classifier.module),
        preprocessing=teacher.classifier.preprocessing,
        precision=source.precision,
        num_classes=num_classes,
        logits=source.logits,
    )


def _unfinished(path: Path, cache: Cache) -> list[Shard]:
    """List the shards to compute: those never committed, and those whose bytes are no longer what was committed."""
    broken = damaged(path, cache.layout, cache.shards)
    for shard, problems in broken.items():
        say(f"writing again: {problems[0]}")
        for group in cache.layout.groups:
            (path / group.record_file(shard)).unlink()
    kept = set(cache.shards) - broken.keys()
    return [shard for shard in cache.layout.shards() if shard not in kept]
