"""Stage one on a Dask cluster: the client prepares and finishes the cache, workers fill its shards.

The scheduler hands every shard to one worker, and to another where that one dies. What is committed lies on the disk:
client, scheduler and workers may all be killed and started again.
"""

import contextlib
import importlib.util
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from logitcache.cache.snapshot import locate
from logitcache.cache.write.claims import preparing, writing
from logitcache.errors import CacheError, MissingExtraError, RecipeError
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.cluster.dask import (
    Check,
    LostScheduler,
    arriving,
    connected,
    local_cluster,
    resources_of,
    result_of,
)
from logitcache.stage_one.cluster.worker import Job, Outcome, Work, compute, release
from logitcache.stage_one.inputs import as_recorded, build_teachers, open_images
from logitcache.stage_one.precompute import Done, PrecomputeResult, finished, passes_of, stopped_message
from logitcache.stage_one.preparation import Plan, prepare
from logitcache.stage_one.share import WHOLE, Part, Share
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.views.spec import Views, require_one_size

if TYPE_CHECKING:
    from distributed import Client

RETRIES = 3
"""How often a shard is computed again after an error that is no user's."""

FIRST, AGAIN = 30.0, 300.0
"""Seconds to wait for a scheduler that was never there, and for one that was lost."""

LOSSES = 5
"""How often in a row a scheduler may be lost with nothing committed in between."""

VISIBLE, PAUSE = 90.0, 0.1
"""Seconds after which a network disk shows here what a worker wrote, and between looking for it."""


def precompute_on_cluster(
    recipe: PrecomputeRecipe,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    part: str | None = None,
    wait: bool = False,
) -> PrecomputeResult:
    """Fill the recipe's cache by the workers of a running `scheduler`, or by `workers` processes of this machine.

    The bytes are those that `precompute` writes. Data set and models are named in the recipe: each worker opens them
    itself. Raises as `precompute` does, RecipeError where no scheduler answers, CacheError where workers keep dying.
    """
    started = time.perf_counter()
    require_cluster(scheduler, workers)
    _require_named(recipe)
    store, done = locate(recipe.cache), Done()
    recipe = as_recorded(recipe, store)
    mine = WHOLE if part is None else Part.parse(part)
    with contextlib.ExitStack() as held:
        with preparing(store) as target:
            plan = _plan(recipe, target, store, done)
            held.enter_context(writing(store))

        def job(threads: int | None) -> Work:
            return Job(recipe, store, plan.goal, plan.num_recorded, threads)

        share = Share(plan.snapshot, plan.pending, recipe.views_per_image, mine, wait)
        Run("precompute", plan, share, done).fill_on(job, scheduler, workers, resolve_device(recipe.device))
    return finished(plan, share, done, started)


def require_cluster(scheduler: str | None, workers: int | None) -> None:
    """Raise unless one kind of cluster is asked for, and Dask is there."""
    if (scheduler is None) == (workers is None):
        raise RecipeError("a cluster is either at an address or of this machine. Fix: --scheduler or --workers")
    if importlib.util.find_spec("distributed") is None:
        raise MissingExtraError("a Dask cluster", "cluster")


def _require_named(recipe: PrecomputeRecipe) -> None:
    missing = [] if recipe.dataset is not None else ["dataset"]
    missing += [] if recipe.teachers else ["teachers"]
    missing += [f"teachers.{name}.model" for name, source in recipe.teachers.items() if source.model is None]
    if missing:
        raise RecipeError(
            f"the recipe does not name {', '.join(missing)}: on a cluster every worker opens these itself, objects are "
            'not sent. Fix: name them in the recipe; your own as {kind: custom, factory: "package.module:function"}'
        )


def _plan(recipe: PrecomputeRecipe, target: Path, store: Store, done: Done) -> Plan:
    views = Views(open_images(recipe, None), recipe.views)
    require_one_size(views)
    teachers = build_teachers(recipe, {}, views, resolve_device(recipe.device))
    plan = prepare(recipe, views, teachers, target, store)
    done.passes += passes_of(teachers)
    return plan


class Run:
    """The shards of a plan that are to do, and what is done of them; `what` names it to the user."""

    def __init__(self, what: str, plan: Plan, share: Share, done: Done) -> None:
        self._what, self._plan, self._share, self._done = what, plan, share, done

    def fill_on(
        self, job: Callable[[int | None], Work], scheduler: str | None, workers: int | None, device: torch.device
    ) -> None:
        """Hand out the job, of so many threads of torch, on a running scheduler or on workers of this machine."""
        if self._share.groups:
            torch.cuda.empty_cache()  # what the client's teachers took of a device is for the workers
            if workers is not None:
                with local_cluster(workers, device) as local:
                    self.fill(local.address, job(local.threads), local.check)
            elif scheduler is not None:
                self.fill(scheduler, job(None))
        with self._stopping(lambda: None) as check:
            self._share.awaits(check)  # the shards of other parts

    @contextlib.contextmanager
    def _stopping(self, workers_live: Check) -> Iterator[Check]:
        """Yield what raises Stopped after a signal, and what `workers_live` raises."""
        with stop_flag() as stop:

            def check() -> None:
                if stop:
                    raise stop.stopped(stopped_message(self._plan.store, self._done.shards, len(self._plan.pending)))
                workers_live()

            yield check

    def fill(self, address: str, job: Work, workers_live: Check = lambda: None) -> None:
        """Hand out shards until all are committed, or none of those that are left can be had."""
        name = job.name
        groups, patience, losses = self._share.groups, FIRST, 0
        with self._stopping(workers_live) as check:
            while groups:
                before = self._done.shards
                try:
                    with contextlib.closing(connected(address, patience, check)) as client:
                        self._hand_out(client, name, pickle.dumps(job), groups, check)
                        with contextlib.suppress(OSError):  # all is committed, whoever is gone by now
                            client.run(release, name, on_error="ignore")
                    losses = 0
                except LostScheduler as error:
                    logger.info(f"the scheduler at {address} is gone, waiting for it to come back")
                    patience, losses = AGAIN, 1 if self._done.shards > before else losses + 1
                    if losses > LOSSES:
                        raise CacheError(
                            f"{error}. {self._plan.store} is incomplete. Fix: the same command continues"
                        ) from error
                groups = self._share.grouped(self._missing(groups))
                # Others have what nobody could have: as in a single process, these are left to them.
                if not losses and self._done.shards == before and not self._share.awaits(check):
                    return

    def _hand_out(self, client: "Client", name: str, job: bytes, groups: Sequence[list[Shard]], check: Check) -> None:
        """Let workers do each group of shards; raise what a user can mend, and what goes wrong again and again."""
        rows = self._plan.layout.shard_rows
        try:
            futures = client.map(
                compute,
                [name] * len(groups),
                [job] * len(groups),
                groups,
                key=[f"shard-view{group[0].view}-{group[0].start // rows}-{name}" for group in groups],
                resources=resources_of(client, check),
                retries=RETRIES,
            )
        except OSError as error:
            raise LostScheduler(f"the scheduler of {client} is gone: {error}") from error
        unit = "shards" if all(len(group) == 1 for group in groups) else "groups of shards"
        for future in track(arriving(client, futures, check), self._what, len(groups), unit):
            outcome: Outcome = result_of(future)
            self._done.add(outcome.done)
            if outcome.refusal is not None:
                raise outcome.refusal.error()
            self._require_seen(outcome.committed)

    def _missing(self, groups: Sequence[list[Shard]]) -> list[Shard]:
        return [shard for group in groups for shard in group if self._share.missing(shard)]

    def _require_seen(self, committed: list[Shard]) -> None:
        """Wait until what workers committed is seen here too; raise CacheError where it never is."""
        deadline = time.monotonic() + VISIBLE
        while unseen := self._missing([committed]):
            if time.monotonic() > deadline:
                view, start, stop = unseen[0]
                store = self._plan.store
                where = store.path.absolute() if store.is_local else store
                raise CacheError(
                    f"a worker has committed view {view} rows {start}..{stop} to {where}, which is not there at the "
                    "client. Fix: a file system that client and workers share, at the same path"
                )
            time.sleep(PAUSE)
