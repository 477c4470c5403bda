"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.arrays import ArrayGroup, Shard
from logitcache.cache.copies import place_of
from logitcache.cache.layout import CHECKSUMS, PARAMETERS, Layout
from logitcache.cache.locate import locate
from logitcache.cache.row_errors import add, statistics_of
from logitcache.cache.sharing import preparing, writing
from logitcache.cache.unreadable import note_unreadable
from logitcache.cache.verify import stored_bytes
from logitcache.cache.writer import CacheWriter, Rows, empty_rows
from logitcache.console import say, track
from logitcache.device import resolve_device, to_device
from logitcache.errors import DataError
from logitcache.stopping import stop_flag
from logitcache.teacher.encoding import Encoded, encode
from logitcache.teacher.models import Teacher, require_answers, require_fits
from logitcache.teacher.preparation import Plan, as_given, build_teachers, finish, open_images, prepare
from logitcache.teacher.recipes import PrecomputeRecipe
from logitcache.teacher.share import WHOLE, Part, Share
from logitcache.views import canaries
from logitcache.views.checksums import require_rows, row_checksums
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, require_one_size

__all__ = ["PrecomputeRecipe", "PrecomputeResult", "precompute"]


@dataclass(frozen=True)
class PrecomputeResult:
    """What a run did; `views` are images as the teachers saw them, computed in this run.

    `shards_left` are not committed yet: other processes have claimed them, or other parts have them.
    """

    cache: str
    shards: int
    shards_written: int
    shards_left: int
    views: int
    teacher_passes: int
    seconds: float
    bytes: int


def precompute(
    recipe: PrecomputeRecipe,
    *,
    teachers: Mapping[str, nn.Module] | None = None,
    dataset: object | None = None,
    part: str | None = None,
) -> PrecomputeResult:
    """Fill the recipe's cache; continues where earlier runs stopped, adds views and teachers, shares with other runs.

    `teachers` and `dataset` give the objects themselves in place of their recipe entries; `part` "i/n" takes only each
    n-th shard. Raises MismatchError when the cache was made by another recipe, DataError naming an image that cannot
    be read, Stopped after SIGTERM or Ctrl-C.
    """
    started = time.perf_counter()
    mine = WHOLE if part is None else Part.parse(part)
    device = resolve_device(recipe.device)
    views = Views(open_images(recipe, dataset), recipe.views)
    require_one_size(views)
    recipe = as_given(recipe, teachers or {}, dataset)
    key = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)[0]
    built = build_teachers(recipe, teachers or {}, views, key, device)
    path = locate(recipe.cache)
    done = Done()
    with contextlib.ExitStack() as seen:
        for teacher in built:
            seen.callback(teacher.remove_taps)
        with preparing(path) as target:
            plan = prepare(recipe, views, built, target, path)
            seen.enter_context(writing(path))
        share = Share(path, plan.layout, plan.pending, recipe.views_per_image, mine)
        if plan.pending:
            loader = ViewLoader(views.answered(), recipe.num_workers, recipe.start_method)
            with contextlib.closing(loader):
                fill(recipe, views, loader, built, path, plan, share, done)
    return finished(path, plan, done, started)


def finished(path: Path, plan: Plan, done: "Done", started: float) -> PrecomputeResult:
    """Finish a cache as far as its shards are there; say and return how it stands."""
    left = finish(path, plan)
    if left:
        say(
            f"{place_of(path)}: {done.shards} shards written, {left} of {plan.layout.num_shards} are left to other "
            "processes or parts. Should these end without them, the same command writes them"
        )
    elif not plan.pending:
        say(f"{place_of(path)} is complete, there is nothing to do")
    seconds = time.perf_counter() - started
    return PrecomputeResult(
        str(place_of(path)),
        plan.layout.num_shards,
        done.shards,
        left,
        done.views,
        done.passes,
        seconds,
        stored_bytes(path),
    )


@dataclass
class Done:
    """What is committed in this run: shards, their rows, and rows times the teachers that answered them."""

    shards: int = 0
    views: int = 0
    passes: int = 0

    def count(self, shard: Shard, num_teachers: int) -> None:
        self.shards += 1
        self.views += shard.stop - shard.start
        self.passes += (shard.stop - shard.start) * num_teachers

    def add(self, other: "Done") -> None:
        """Count what was committed elsewhere for this run."""
        self.shards += other.shards
        self.views += other.views
        self.passes += other.passes


def fill(
    recipe: PrecomputeRecipe,
    views: Views,
    loader: ViewLoader,
    teachers: list[Teacher],
    path: Path,
    plan: Plan,
    share: Share,
    done: Done,
) -> None:
    """Render, answer, encode and write, shard by shard: the loop of stage one."""
    answered = views.answered()
    writer = CacheWriter(path, plan.layout)
    total = sum(-(-(group[0].stop - group[0].start) // recipe.batch_size) for group in share.groups)
    with stop_flag() as stop, contextlib.closing(share), contextlib.closing(writer):
        taken = -1
        # Once more after the last: a process that died may have let go of a shard since.
        while taken != done.shards:
            taken = done.shards
            ours, theirs = itertools.tee(share.take())
            ahead = (_keys(batch) for group in theirs for batch in batches_of(group, answered, recipe.batch_size))
            images = track(loader.render(ahead), "precompute", total, "batches")
            for group in ours:
                work = _Work.of(plan.layout, share, group)
                for batch in batches_of(group, answered, recipe.batch_size):
                    rendered = _next_images(images, views, _keys(batch), path).chunk(len(batch))
                    for (shard, keys), pixels in zip(batch.items(), rendered, strict=True):
                        keep(work.rows[shard], shard, teachers, plan, views, keys, pixels)
                    if stop:
                        writer.flush()
                        raise stop.stopped(stopped_message(path, done.shards, len(plan.pending)))
                for shard in group:
                    writer.submit(shard, work.rows[shard], functools.partial(share.committed, shard))
                    done.count(shard, work.num_teachers(shard, plan.layout))
            writer.flush()


class _Work(NamedTuple):
    """What is to do of claimed shards: the names of the groups that are missing, and room for their rows."""

    missing: dict[Shard, list[str]]
    rows: dict[Shard, Rows]

    @classmethod
    def of(cls, layout: Layout, share: Share, shards: Sequence[Shard]) -> "_Work":
        missing = {shard: share.missing(shard) for shard in shards}
        rows = {shard: empty_rows([g for g in layout.groups if g.name in missing[shard]], shard) for shard in shards}
        return cls(missing, rows)

    def num_teachers(self, shard: Shard, layout: Layout) -> int:
        """Count the teachers that answer."""
        return len({group.teacher for group in layout.targets if group.name in self.missing[shard]})


def batches_of(group: list[Shard], views: Views, batch_size: int) -> Iterator[dict[Shard, list[ViewKey]]]:
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
        named = dict.fromkeys(key.index for key in (*keys, *views.answered().partners(keys)))
        note_unreadable(path, [index for index in named if not _is_readable(views, index)])
        raise


def _is_readable(views: Views, index: int) -> bool:
    try:
        views.dataset.read(index)
    except DataError:
        return False
    return True


def keep(
    rows: Rows, shard: Shard, teachers: list[Teacher], plan: Plan, views: Views, keys: list[ViewKey], images: Tensor
) -> None:
    """Let the teachers answer a batch of one shard, and put all that is kept of it in its places.

    Where only further teachers are to answer, the views must be those that the others have seen.
    """
    places = np.array([key.index for key in keys]) - shard.start
    ids = [views.dataset.ids[key.index] for key in keys]
    device = teachers[0].device
    pixels = to_device(images, device)
    labels = to_device(torch.from_numpy(views.dataset.labels[places + shard.start]), device)
    for teacher in teachers:
        groups = [group for group in plan.layout.of(teacher.name) if group.arrays[0].name in rows]
        if groups:
            answers = teacher(pixels, labels)
            require_answers(teacher, answers, plan.goal.teachers[teacher.name], ids)
            encoded = encode(plan.coders, plan.goal.teachers[teacher.name], groups, answers)
            _keep_answers(rows, teacher, groups, encoded, ids, places)
    if plan.layout.views is None:
        return
    if plan.layout.views.arrays[0].name in rows:
        for array in plan.layout.views.arrays:
            rows[array.name][places] = RECORDED[array.suffix](views, keys, images)
    elif plan.checksums is not None and shard.view < plan.num_recorded:
        require_rows(images, keys, plan.checksums(keys), views.dataset.ids)


def _checksums(views: Views, keys: list[ViewKey], images: Tensor) -> NDArray[np.uint32]:
    return row_checksums(images)


def _parameters(views: Views, keys: list[ViewKey], images: Tensor) -> NDArray[np.int64]:
    sizes = views.dataset.sizes()[[key.index for key in keys]]
    return views.spec.rows(keys, sizes, len(views.dataset.ids))


RECORDED = {CHECKSUMS: _checksums, PARAMETERS: _parameters}
"""What may be kept of the views themselves."""


def _keep_answers(
    rows: Rows,
    teacher: Teacher,
    groups: Sequence[ArrayGroup],
    encoded: Mapping[str, Encoded],
    ids: Sequence[str],
    places: NDArray[np.int64],
) -> None:
    """Copy what encodings made of a batch to its places in the shard."""
    for target, (arrays, _) in encoded.items():
        require_fits(teacher, target, arrays, ids)
    for group in groups:
        arrays, errors = encoded[group.target]
        for array in group.rows:
            rows[array.name][places] = arrays[array.suffix].cpu().numpy()
        if group.errors is not None and errors is not None:
            add(rows[group.errors.name][0], statistics_of(errors))


def stopped_message(path: Path, num_finished: int, total: int) -> str:
    """Say what a run that is stopped leaves."""
    return (
        f"stopped: {num_finished} of the {total} shards that were to do are committed in {place_of(path)}, what was in "
        "progress is dropped. The same command continues"
    )
