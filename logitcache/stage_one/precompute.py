"""Stage one: run the teachers once over every view and keep their answers."""

import contextlib
import functools
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from logitcache.cache.encodings.dense import Dense
from logitcache.cache.format.layout import Layout
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.metadata import read_manifest
from logitcache.cache.format.row_errors import BOUND
from logitcache.cache.snapshot import locate
from logitcache.cache.write.claims import preparing, writing
from logitcache.cache.write.unreadable_images import note_unreadable
from logitcache.cache.write.writer import CacheWriter, Rows, empty_rows
from logitcache.errors import DataError, TargetErrorWarning
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.inputs import as_given, as_recorded, build_teachers, open_images
from logitcache.stage_one.keeper import Keeper
from logitcache.stage_one.preparation import Plan, finish, prepare
from logitcache.stage_one.share import WHOLE, Left, Part, Share
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, require_one_size

__all__ = ["PrecomputeRecipe", "PrecomputeResult", "precompute"]


@dataclass(frozen=True)
class PrecomputeResult:
    """What a run did; `row_views` counts what it wrote answers to, of which an image in one view is one.

    `teacher_passes` counts every image that a teacher's network took, also to try it and to fit encodings.
    `shards_left` are not committed yet: `shards_held` of them are claimed by other running processes, and
    `shards_of_other_parts` are for other parts.
    """

    cache: str
    shards: int
    shards_written: int
    shards_left: int
    row_views: int
    teacher_passes: int
    seconds: float
    bytes: int
    shards_held: int = 0
    shards_of_other_parts: int = 0

    @property
    def left(self) -> Left:
        """The shards that are not committed, by who has them."""
        free = self.shards_left - self.shards_held - self.shards_of_other_parts
        return Left(self.shards_held, self.shards_of_other_parts, free)


def precompute(
    recipe: PrecomputeRecipe,
    *,
    teachers: Mapping[str, nn.Module] | None = None,
    dataset: object | None = None,
    part: str | None = None,
    wait: bool = False,
) -> PrecomputeResult:
    """Fill the recipe's cache; continues where earlier runs stopped, adds views and teachers, shares with other runs.

    `teachers` and `dataset` give the objects themselves in place of their recipe entries; `part` "i/n" takes only each
    n-th shard; `wait` returns only when the cache is whole, whoever computes its shards. Raises MismatchError if the
    cache was made by another recipe, DataError naming an image that cannot be read, Stopped after SIGTERM or Ctrl-C.
    """
    started = time.perf_counter()
    mine = WHOLE if part is None else Part.parse(part)
    device, store = resolve_device(recipe.device), locate(recipe.cache)
    recipe = as_given(as_recorded(recipe, store), teachers or {}, dataset)
    views = Views(open_images(recipe, dataset), recipe.views)
    require_one_size(views)
    built = build_teachers(recipe, teachers or {}, views, device)
    done = Done()
    with contextlib.ExitStack() as seen:
        for teacher in built:
            seen.callback(teacher.remove_taps)
        with preparing(store) as target:
            plan = prepare(recipe, views, built, target, store)
            seen.enter_context(writing(store))
        done.passes += passes_of(built)
        share = Share(plan.snapshot, plan.pending, recipe.views_per_image, mine, wait)
        if plan.pending:
            logger.info(
                f"{len(plan.pending)} shards to do; a stop loses at most the {share.most_lost} row-views in progress"
            )
            loader = ViewLoader(views.answered(), recipe.num_workers, recipe.start_method)
            with contextlib.closing(loader):
                fill(recipe, views, loader, built, plan, share, done)
    return finished(plan, share, done, started)


def finished(plan: Plan, share: Share, done: "Done", started: float) -> PrecomputeResult:
    """Finish a cache as far as its shards are there, and return how it stands."""
    store, missing = plan.store, finish(plan)
    left = share.left(missing)
    if not plan.pending:
        logger.info(f"{store} is complete, there is nothing to do")
    if not missing:
        _warn_of_rounding(read_manifest(store))
    seconds = time.perf_counter() - started
    return PrecomputeResult(
        str(store),
        plan.layout.num_shards,
        done.shards,
        len(missing),
        done.row_views,
        done.passes,
        seconds,
        store.stored_bytes(),
        left.held,
        left.apart,
    )


def _warn_of_rounding(manifest: Manifest) -> None:
    """Warn of dense logits that float16 rounds too much, because of what all classes of a row have in common."""
    for name, entry in manifest.teachers.items():
        worst = max(entry.errors_of(LOGITS), key=lambda one: one.scaled, default=None)
        if worst is not None and worst.scaled > BOUND and isinstance(entry.logits, Dense):
            warnings.warn(
                f"teachers.{name}: the logits have so large a common offset that float16 rounds away what tells classes"
                f" apart: a mean KL divergence of {worst.mean:.2g} nats at T = {worst.temperature:g}. Fix: precompute "
                f"into another cache with teachers.{name}.logits: {{kind: dense, dtype: float32}}, or {{kind: uint8}} "
                "or {kind: transform, step: 0.1}, which store each row without its offset",
                TargetErrorWarning,
                stacklevel=3,
            )


@dataclass
class Done:
    """What is committed in this run: shards and their row-views; and how many images teachers have taken for it."""

    shards: int = 0
    row_views: int = 0
    passes: int = 0

    def count(self, shard: Shard) -> None:
        self.shards += 1
        self.row_views += shard.stop - shard.start

    def add(self, other: "Done") -> None:
        """Count what was committed elsewhere for this run."""
        self.shards += other.shards
        self.row_views += other.row_views
        self.passes += other.passes


def fill(
    recipe: PrecomputeRecipe,
    views: Views,
    loader: ViewLoader,
    teachers: list[Teacher],
    plan: Plan,
    share: Share,
    done: Done,
) -> None:
    """Render, answer, encode and write, shard by shard: the loop of stage one."""
    answered, keeper = views.answered(), Keeper(views, teachers, plan)
    writer, before = CacheWriter(plan.store, plan.layout), passes_of(teachers)
    total = sum(-(-(group[0].stop - group[0].start) // recipe.batch_size) for group in share.groups)
    with stop_flag() as stop, contextlib.closing(share), contextlib.closing(writer):

        def check() -> None:
            if stop:
                writer.flush()
                raise stop.stopped(stopped_message(plan.store, done.shards, len(plan.pending)))

        taken = -1
        # Once more after the last: a process that died may have let go of a shard since.
        while taken != done.shards or share.awaits(check):
            taken = done.shards
            ours, theirs = itertools.tee(share.take())
            ahead = (_keys(batch) for group in theirs for batch in batches_of(group, answered, recipe.batch_size))
            images = track(loader.render(ahead), "precompute", total, "batches")
            for group in ours:
                rows = _rows_of(plan.layout, share, group)
                for batch in batches_of(group, answered, recipe.batch_size):
                    rendered = _next_images(images, views, _keys(batch), plan.store).chunk(len(batch))
                    for (shard, keys), pixels in zip(batch.items(), rendered, strict=True):
                        keeper.keep(rows[shard], shard, keys, pixels)
                    check()
                for shard in group:
                    writer.submit(shard, rows[shard], functools.partial(share.committed, shard))
                    done.count(shard)
            writer.flush()
    done.passes += passes_of(teachers) - before


def passes_of(teachers: Sequence[Teacher]) -> int:
    """Count the images that the networks of teachers have taken."""
    return sum(teacher.passes for teacher in teachers)


def _rows_of(layout: Layout, share: Share, shards: Sequence[Shard]) -> dict[Shard, Rows]:
    """Allocate the rows that claimed shards lack."""
    missing = {shard: share.missing(shard) for shard in shards}
    return {shard: empty_rows([g for g in layout.groups if g.name in missing[shard]], shard) for shard in shards}


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


def _next_images(images: Iterator[Tensor], views: Views, keys: list[ViewKey], store: Store) -> Tensor:
    """Take the next batch; images that cannot be read may be mended before the run continues."""
    try:
        return next(images)
    except DataError:
        named = dict.fromkeys(key.index for key in (*keys, *views.answered().partners(keys)))
        note_unreadable(store, [index for index in named if not _is_readable(views, index)])
        raise


def _is_readable(views: Views, index: int) -> bool:
    try:
        views.dataset.read(index)
    except DataError:
        return False
    return True


def stopped_message(store: Store, num_finished: int, total: int) -> str:
    """Say what a run that is stopped leaves."""
    return (
        f"stopped: {num_finished} of the {total} shards that were to do are committed in {store}, what was in "
        "progress is dropped. The same command continues"
    )
