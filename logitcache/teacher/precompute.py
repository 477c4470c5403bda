"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from logitcache.cache.create import writer_lock
from logitcache.cache.layout import Layout, Shard, TeacherLayout
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
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views

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
    size = recipe.batch_size
    loader = ViewLoader(views, recipe.num_workers, recipe.start_method)
    total = sum(-(-(shard.stop - shard.start) // size) for shard in shards)
    batches = itertools.chain.from_iterable(_batches(shard, size) for shard in shards)
    images = track(loader.render(batches), "precompute", total, "batches")
    writer = CacheWriter(path, layout)
    with stop_flag() as stop, contextlib.closing(loader), contextlib.closing(writer):
        for number, shard in enumerate(shards):
            rows = empty_rows(layout.teachers, shard)
            for keys in _batches(shard, size):
                pixels = to_device(_next_images(images, views, keys, path), teachers[0].device)
                ids = [views.dataset.ids[key.index] for key in keys]
                for teacher, arrays in zip(teachers, layout.teachers, strict=True):
                    _keep(rows, teacher, arrays, pixels, ids, keys[0].index - shard.start)
                if stop:
                    writer.flush()
                    raise stop.stopped(_stopped_message(path, number, len(shards)))
            writer.submit(shard, rows)
        writer.flush()


def _batches(shard: Shard, batch_size: int) -> Iterator[list[ViewKey]]:
    for start in range(shard.start, shard.stop, batch_size):
        yield [ViewKey(shard.view, index) for index in range(start, min(start + batch_size, shard.stop))]


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


def _keep(rows: Rows, teacher: Teacher, layout: TeacherLayout, pixels: Tensor, ids: Sequence[str], place: int) -> None:
    """Encode a batch's answers on the device and copy them to their places in the shard."""
    logits = teacher(pixels).logits
    assert isinstance(logits, Tensor)
    require_answers(teacher, logits, layout.entry.num_classes, ids)
    encoded = layout.entry.logits.encode(logits)
    require_fits(teacher, encoded, ids)
    for array in layout.arrays:
        rows[array.name][place : place + len(ids)] = encoded[layout.suffix(array)].cpu().numpy()


def _stopped_message(path: Path, finished: int, total: int) -> str:
    return (
        f"stopped: {finished} of the {total} shards that were to do are committed in {path}, the one in progress "
        "was dropped. The same command continues"
    )
