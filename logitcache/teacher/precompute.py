"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from logitcache.cache.create import create_skeleton, read_manifest, writer_lock
from logitcache.cache.layout import Layout, Shard, TeacherLayout, choose_shard_rows, layout_of
from logitcache.cache.manifest import Manifest, TeacherEntry, require_same
from logitcache.cache.reader import Cache
from logitcache.cache.verify import check_metadata, committed, damaged, stored_bytes
from logitcache.cache.writer import CacheWriter, Rows, empty_rows
from logitcache.console import say, track
from logitcache.device import resolve_device, to_device
from logitcache.errors import MismatchError, RecipeError
from logitcache.files import remove_leftovers
from logitcache.models import weights_digest
from logitcache.recipe import Component, Count, Name
from logitcache.stopping import stop_flag
from logitcache.teacher.models import Teacher, TeacherSource, build_teacher, require_finite
from logitcache.versions import versions
from logitcache.views import canaries
from logitcache.views.datasets import Dataset, fingerprint, open_dataset
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.spec import Views, ViewSpec


class PrecomputeRecipe(Component):
    """Which images, which views of them, which teachers, and where their answers go.

    Only `dataset`, `views` and `teachers` decide what is stored; the rest says how fast. `shard_rows` is the unit of
    work that a stop can lose; by default about 32 MiB of the largest array.
    """

    cache: str
    dataset: Dataset | None = None
    views: ViewSpec = ViewSpec()
    teachers: Annotated[dict[Name, TeacherSource], Field(min_length=1)]
    batch_size: Count = 256
    num_workers: Annotated[int, Field(ge=0)] = 2
    start_method: StartMethod = "forkserver"
    shard_rows: Count | None = None
    device: str = "auto"


@dataclass(frozen=True)
class PrecomputeResult:
    """What a run did; `views` are images as the teachers saw them, computed in this run."""

    cache: str
    shards: int
    shards_written: int
    views: int
    teacher_passes: int
    seconds: float
    bytes: int


def precompute(
    recipe: PrecomputeRecipe, *, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> PrecomputeResult:
    """Fill the recipe's cache; continues where an earlier run of the same recipe stopped.

    `teachers` and `dataset` give the objects themselves in place of their recipe entries. Raises MismatchError when the
    cache was made by another recipe, DataError naming an image that cannot be read, Stopped after SIGTERM or Ctrl-C.
    """
    started = time.perf_counter()
    device = resolve_device(recipe.device)
    views = Views(_open(recipe, dataset), recipe.views)
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    built = _build(recipe, teachers or {}, views[keys[0]].shape[0], device)
    path = Path(recipe.cache)
    with writer_lock(path) as target:
        layout, pending = _prepare(recipe, views, keys, built, target, path)
        if pending:
            _fill(recipe, views, built, path, layout, pending)
    total = layout.num_views * layout.shards_per_view
    rows = sum(shard.stop - shard.start for shard in pending)
    seconds = time.perf_counter() - started
    return PrecomputeResult(str(path), total, len(pending), rows, rows * len(built), seconds, stored_bytes(path))


def _open(recipe: PrecomputeRecipe, dataset: object | None) -> ImageDataset:
    given = recipe.dataset if dataset is None else dataset
    if given is None:
        raise RecipeError("the recipe names no data set. Fix: give `dataset:`, or pass the data set itself")
    opened = open_dataset(given)
    if len(opened.ids) == 0:
        raise RecipeError("the data set has no images")
    return opened


def _build(
    recipe: PrecomputeRecipe, given: Mapping[str, nn.Module], channels: int, device: torch.device
) -> list[Teacher]:
    unknown = sorted(given.keys() - recipe.teachers.keys())
    if unknown:
        raise RecipeError(f"teachers {unknown} were given, but the recipe names {sorted(recipe.teachers)}")
    return [build_teacher(name, source, given.get(name), channels, device) for name, source in recipe.teachers.items()]


def _prepare(
    recipe: PrecomputeRecipe, views: Views, keys: list[ViewKey], teachers: list[Teacher], target: Path, path: Path
) -> tuple[Layout, list[Shard]]:
    """Create the cache, or prove that the recipe is the one that made it; returns the shards that are still to do."""
    records, pixels = canaries.take(views, keys)
    if target != path:
        manifest = _manifest(recipe, views, teachers, records, pixels)
        create_skeleton(target, path, manifest, views.dataset.labels, views.dataset.digests(), pixels.numpy())
        return layout_of(manifest), list(layout_of(manifest).shards())
    cache = Cache(path, read_manifest(path))
    cache.require_dataset(views.dataset)
    require_same(cache.manifest, _manifest(recipe, views, teachers, records, pixels), str(path))
    cache.require_canaries(views)
    check_metadata(path, cache.manifest)
    remove_leftovers(path)
    return cache.layout, _unfinished(path, cache.layout)


def _manifest(
    recipe: PrecomputeRecipe,
    views: Views,
    teachers: list[Teacher],
    records: tuple[canaries.Canary, ...],
    pixels: Tensor,
) -> Manifest:
    entries = {t.name: _entry(recipe.teachers[t.name], t, views.dataset, pixels) for t in teachers}
    return Manifest(
        dataset=recipe.dataset,
        fingerprint=fingerprint(views.dataset),
        views=recipe.views,
        image_shape=(pixels.shape[1], pixels.shape[2], pixels.shape[3]),
        shard_rows=choose_shard_rows(list(entries.values()), len(views.dataset.ids), recipe.shard_rows),
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


def _unfinished(path: Path, layout: Layout) -> list[Shard]:
    """List the shards to compute: those never committed, and those whose bytes are no longer what was committed."""
    done = [shard for shard in layout.shards() if committed(path, layout, shard)]
    broken = damaged(path, layout, done)
    for shard, problems in broken.items():
        say(f"writing again: {problems[0]}")
        for teacher in layout.teachers:
            (path / teacher.record_file(shard)).unlink()
    kept = set(done) - broken.keys()
    return [shard for shard in layout.shards() if shard not in kept]


def _fill(
    recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], path: Path, layout: Layout, shards: list[Shard]
) -> None:
    """Render, answer, encode and write, shard by shard: the loop of stage one."""
    loader = ViewLoader(views, recipe.num_workers, recipe.start_method)
    batches = [list(_batches(shard, recipe.batch_size)) for shard in shards]
    images = track(
        loader.render(itertools.chain.from_iterable(batches)), "precompute", sum(map(len, batches)), "batches"
    )
    writer = CacheWriter(path, layout)
    with stop_flag() as stop, contextlib.closing(writer):
        for number, (shard, keys_of_shard) in enumerate(zip(shards, batches, strict=True)):
            rows = empty_rows(layout.teachers, shard)
            for keys, pixels in zip(keys_of_shard, images, strict=False):
                on_device = to_device(pixels, teachers[0].device)
                for teacher, arrays in zip(teachers, layout.teachers, strict=True):
                    _keep(rows, teacher, arrays, on_device, keys, shard)
                if stop:
                    writer.flush()
                    raise stop.stopped(_stopped_message(path, number, len(shards)))
            writer.submit(shard, rows)
        writer.flush()


def _batches(shard: Shard, batch_size: int) -> Iterator[list[ViewKey]]:
    for start in range(shard.start, shard.stop, batch_size):
        yield [ViewKey(shard.view, index) for index in range(start, min(start + batch_size, shard.stop))]


def _keep(
    rows: Rows, teacher: Teacher, layout: TeacherLayout, pixels: Tensor, keys: list[ViewKey], shard: Shard
) -> None:
    """Encode a batch's answers on the device and copy them to their places in the shard."""
    logits = teacher(pixels).logits
    assert isinstance(logits, Tensor)
    encoded = layout.entry.logits.encode(logits)
    require_finite(teacher.name, encoded, keys[0].index)
    place = keys[0].index - shard.start
    for array in layout.arrays:
        rows[array.name][place : place + len(keys)] = encoded[layout.suffix(array)].cpu().numpy()


def _stopped_message(path: Path, finished: int, total: int) -> str:
    return (
        f"stopped: {finished} of the {total} shards that were to do are committed in {path}, the one in progress "
        "was dropped. The same command continues"
    )
