"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.create import writer_lock
from logitcache.cache.layout import CHECKSUMS, PARAMETERS, Layout, Shard, TeacherLayout
from logitcache.cache.unreadable import note_unreadable
from logitcache.cache.verify import stored_bytes
from logitcache.cache.writer import CacheWriter, Rows, empty_rows
from logitcache.console import say, track
from logitcache.device import resolve_device, to_device
from logitcache.errors import DataError
from logitcache.stopping import stop_flag
from logitcache.teacher.models import Teacher, require_answers, require_fits
from logitcache.teacher.preparation import as_given, build_teachers, open_images, prepare
from logitcache.teacher.recipes import PrecomputeRecipe
from logitcache.views import canaries
from logitcache.views.checksums import row_checksums
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, require_one_size

__all__ = ["PrecomputeRecipe", "PrecomputeResult", "precompute"]


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
    views = Views(open_images(recipe, dataset), recipe.views)
    require_one_size(views)
    recipe = as_given(recipe, teachers or {}, dataset)
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    built = build_teachers(recipe, teachers or {}, views, keys[0], device)
    path = Path(recipe.cache)
    with writer_lock(path) as target:
        layout, pending = prepare(recipe, views, keys, built, target, path)
        if pending:
            _fill(recipe, views, built, path, layout, pending)
        else:
            say(f"{path} is complete, there is nothing to do")
    rows = sum(shard.stop - shard.start for shard in pending)
    seconds = time.perf_counter() - started
    return PrecomputeResult(
        str(path), layout.num_shards, len(pending), rows, rows * len(built), seconds, stored_bytes(path)
    )


def _fill(
    recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], path: Path, layout: Layout, shards: list[Shard]
) -> None:
    """Render, answer, encode and write, shard by shard: the loop of stage one."""
    groups = _groups(shards, recipe.views_per_image)
    answered = Views(views.dataset, views.spec.answered())
    loader = ViewLoader(answered, recipe.num_workers, recipe.start_method)
    total = sum(-(-(group[0].stop - group[0].start) // recipe.batch_size) for group in groups)
    ahead = (_keys(batch) for group in groups for batch in _batches(group, answered, recipe.batch_size))
    images = track(loader.render(ahead), "precompute", total, "batches")
    writer = CacheWriter(path, layout)
    finished = 0
    with stop_flag() as stop, contextlib.closing(loader), contextlib.closing(writer):
        for group in groups:
            rows = {shard: empty_rows(layout.groups, shard) for shard in group}
            for batch in _batches(group, answered, recipe.batch_size):
                rendered = _next_images(images, views, _keys(batch), path).chunk(len(batch))
                for (shard, keys), pixels in zip(batch.items(), rendered, strict=True):
                    _keep(rows[shard], shard, teachers, layout, views, keys, pixels)
                if stop:
                    writer.flush()
                    raise stop.stopped(_stopped_message(path, finished, len(shards)))
            for shard in group:
                writer.submit(shard, rows[shard])
            finished += len(group)
        writer.flush()


def _groups(shards: list[Shard], views_per_image: int) -> list[list[Shard]]:
    """Put together the shards of up to `views_per_image` views that hold the same images: one decode serves all."""
    groups: dict[tuple[int, int], list[Shard]] = {}
    for shard in shards:
        groups.setdefault((shard.view // views_per_image, shard.start), []).append(shard)
    return list(groups.values())


def _batches(group: list[Shard], views: Views, batch_size: int) -> Iterator[dict[Shard, list[ViewKey]]]:
    """Yield the keys of up to `batch_size` images by shard; a teacher's batch is the same whatever it is rendered with.

    Partners that are in one shard come together, so that each is decoded once.
    """
    first = group[0]
    pairing = views.spec.pairing(len(views.dataset.ids))
    indices = np.arange(first.start, first.stop)
    if pairing is not None:
        indices = indices[np.argsort(pairing.places(np.full_like(indices, first.view), indices))]
    for start in range(0, len(indices), batch_size):
        images = indices[start : start + batch_size].tolist()
        yield {shard: [ViewKey(shard.view, index) for index in images] for shard in group}


def _keys(batch: Mapping[Shard, list[ViewKey]]) -> list[ViewKey]:
    return list(itertools.chain.from_iterable(batch.values()))


def _next_images(images: Iterator[Tensor], views: Views, keys: list[ViewKey], path: Path) -> Tensor:
    """Take the next batch; images that cannot be read may be mended before the run continues."""
    try:
        return next(images)
    except DataError:
        note_unreadable(path, [key.index for key in keys if not _is_readable(views, key)])
        raise


def _is_readable(views: Views, key: ViewKey) -> bool:
    try:
        views.dataset.read(key.index)
    except DataError:
        return False
    return True


def _keep(
    rows: Rows,
    shard: Shard,
    teachers: list[Teacher],
    layout: Layout,
    views: Views,
    keys: list[ViewKey],
    images: Tensor,
) -> None:
    """Let the teachers answer a batch of one shard, and put all that is kept of it in its places."""
    places = np.array([key.index for key in keys]) - shard.start
    ids = [views.dataset.ids[key.index] for key in keys]
    pixels = to_device(images, teachers[0].device)
    for teacher, arrays in zip(teachers, layout.teachers, strict=True):
        _keep_answers(rows, teacher, arrays, pixels, ids, places)
    if layout.views is not None:
        for array in layout.views.arrays:
            rows[array.name][places] = RECORDED[layout.views.suffix(array)](views, keys, images)


def _checksums(views: Views, keys: list[ViewKey], images: Tensor) -> NDArray[np.uint32]:
    return row_checksums(images)


def _parameters(views: Views, keys: list[ViewKey], images: Tensor) -> NDArray[np.int64]:
    sizes = views.dataset.sizes()[[key.index for key in keys]]
    return views.spec.rows(keys, sizes, len(views.dataset.ids))


RECORDED = {CHECKSUMS: _checksums, PARAMETERS: _parameters}
"""What may be kept of the views themselves."""


def _keep_answers(
    rows: Rows, teacher: Teacher, layout: TeacherLayout, pixels: Tensor, ids: Sequence[str], places: NDArray[np.int64]
) -> None:
    """Encode a batch's answers on the device and copy them to their places in the shard."""
    logits = teacher(pixels).logits
    assert isinstance(logits, Tensor)
    require_answers(teacher, logits, layout.entry.num_classes, ids)
    encoded = layout.entry.logits.encode(logits)
    require_fits(teacher, encoded, ids)
    for array in layout.arrays:
        rows[array.name][places] = encoded[layout.suffix(array)].cpu().numpy()


def _stopped_message(path: Path, finished: int, total: int) -> str:
    return (
        f"stopped: {finished} of the {total} shards that were to do are committed in {path}, the one in progress "
        "was dropped. The same command continues"
    )
