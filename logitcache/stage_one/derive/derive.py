"""Derive a cache from a finished one: logits kept in another way, or several teachers as one. No teacher, no images."""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from logitcache.cache.cache import open_cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cache.write.claims import preparing, writing
from logitcache.cache.write.writer import CacheWriter
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.runtime.console import track
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.cluster.client import Run, require_cluster
from logitcache.stage_one.cluster.worker import Work, filled, name_of
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.derive.derived_rows import Deriver
from logitcache.stage_one.derive.source import Source, prepare_derived
from logitcache.stage_one.precompute import Done, PrecomputeResult, finished, stopped_message
from logitcache.stage_one.preparation import Plan
from logitcache.stage_one.share import WHOLE, Part, Share
from logitcache.store.base import Store
from logitcache.store.remote.client import is_remote
from logitcache.store.shards import Shard

__all__ = ["DeriveRecipe", "derive", "derive_on_cluster"]


def derive(recipe: DeriveRecipe, *, part: str | None = None, wait: bool = False) -> PrecomputeResult:
    """Fill the recipe's `out` from its `cache`; continues where earlier runs stopped, and shares with other runs.

    `part` "i/n" takes only each n-th shard; `wait` returns only when `out` is whole, whoever computes its shards.
    Raises CacheError for a source that is damaged or incomplete, RecipeError for what it does not have, MismatchError
    if `out` is another cache, Stopped after SIGTERM or Ctrl-C.
    """
    started, mine, done = time.perf_counter(), WHOLE if part is None else Part.parse(part), Done()
    with _prepared(recipe) as (source, plan):
        share = Share(plan.snapshot, plan.pending, 1, mine, wait)
        if plan.pending:
            fill(_deriver(recipe, source, plan), plan.store, len(plan.pending), share, done)
    return finished(plan, share, done, started)


def derive_on_cluster(
    recipe: DeriveRecipe,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    part: str | None = None,
    wait: bool = False,
) -> PrecomputeResult:
    """Fill `out` by the workers of a running `scheduler`, or by `workers` processes of this machine.

    The bytes are those that `derive` writes. Raises as it does.
    """
    started, mine, done = time.perf_counter(), WHOLE if part is None else Part.parse(part), Done()
    require_cluster(scheduler, workers)
    with _prepared(recipe) as (source, plan):

        def job(threads: int | None) -> Work:
            return DeriveJob(recipe, source.store, source.manifest, plan.store, plan.goal, threads)

        share = Share(plan.snapshot, plan.pending, 1, mine, wait)
        Run("derive", plan, share, done).fill_on(job, scheduler, workers, resolve_device(recipe.device))
    return finished(plan, share, done, started)


@contextlib.contextmanager
def _prepared(recipe: DeriveRecipe) -> Iterator[tuple[Source, Plan]]:
    """Open the source, and create the cache or prove that it is the one to continue; it is written to meanwhile."""
    _require_apart(recipe)
    store = locate(recipe.out)
    source = Source.of(recipe, open_cache(recipe.cache).snapshot)
    with contextlib.ExitStack() as held:
        with preparing(store) as target:
            plan = prepare_derived(recipe, source, target, store)
            held.enter_context(writing(store))
        yield source, plan


def _require_apart(recipe: DeriveRecipe) -> None:
    """Raise RecipeError where one of both caches is, or lies in, the other."""
    here, there = (one if is_remote(one) else Path(one).resolve().as_posix() for one in (recipe.out, recipe.cache))
    if f"{here}/".startswith(f"{there}/") or f"{there}/".startswith(f"{here}/"):
        raise RecipeError(
            f"out is {recipe.out}, cache {recipe.cache}: a cache is not changed by deriving from it. Fix: another path"
        )


def _deriver(recipe: DeriveRecipe, source: Source, plan: Plan) -> Deriver:
    device = resolve_device(recipe.device)
    return Deriver(source.reader, plan.goal, plan.layout, plan.coders, source.origins, device)


@torch.no_grad()
def fill(deriver: Deriver, store: Store, total: int, share: Share, done: Done) -> None:
    """Read, decode, encode and write, shard by shard; `total` shards were to do."""
    writer = CacheWriter(store, deriver.layout)
    with stop_flag() as stop, contextlib.closing(share), contextlib.closing(writer):

        def check() -> None:
            if stop:
                writer.flush()
                raise stop.stopped(stopped_message(store, done.shards, total))

        taken = -1
        # Once more after the last: a process that died may have let go of a shard since.
        while taken != done.shards or share.awaits(check):
            taken = done.shards
            for (shard,) in track(share.take(), "derive", len(share.groups), "shards"):
                rows = deriver.rows(shard, share.missing(shard), check)
                writer.submit(shard, rows, functools.partial(share.committed, shard))
                done.count(shard)
            writer.flush()


class DeriveJob(NamedTuple):
    """A derived cache to fill from a source; `threads` are torch's, None as they are."""

    recipe: DeriveRecipe
    source: Store
    source_manifest: Manifest
    store: Store
    goal: Manifest
    threads: int | None

    @property
    def name(self) -> str:
        """What tells it from others on one scheduler."""
        return name_of(self.store, self.threads, self.recipe, self.goal)

    def open(self) -> "_Opened":
        """Open both caches."""
        return _Opened(self)


class _Opened:
    """The source as the client saw it, and the cache to fill."""

    def __init__(self, job: DeriveJob) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        source = Source.of(job.recipe, _opened_same(job.source, job.source_manifest))
        self._plan = Plan.of(_opened_same(job.store, job.goal), [])
        self._deriver = _deriver(job.recipe, source, self._plan)

    def fill(self, shards: Sequence[Shard], done: Done) -> list[Shard]:
        """Derive what nobody else has, and wait a while for what somebody has; returns what is committed."""
        store = self._plan.store
        share = Share(self._plan.snapshot, shards, 1, WHOLE)
        return filled(store, share, lambda: fill(self._deriver, store, len(shards), share, done))

    def close(self) -> None:
        """Let go of nothing: files are open only while they are read."""


def _opened_same(store: Store, wanted: Manifest) -> Snapshot:
    """Open a cache that the client names by its location; raise unless it is the same cache here."""
    fix = "Fix: a file system that client and workers share, at the same path"
    store = locate(str(store))
    try:
        opened = Snapshot.read(store)
    except CacheError as error:
        raise CacheError(f"{error}\n  {fix}") from error
    found = opened.manifest
    views = min(found.views.num_views, wanted.views.num_views)
    targets = {name: kept for name, kept in wanted.targets.items() if name in found.teachers}
    if found.restricted(views, targets).content_digest() != wanted.content_digest():
        raise MismatchError(f"{store} is another cache here than at the client. {fix}")
    return opened.of(wanted)
