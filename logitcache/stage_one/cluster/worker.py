"""What a process of a cluster does: open what a recipe names, once, and fill the shards that it is handed."""

import hashlib
import multiprocessing
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self

import torch

from logitcache.cache.cache import Cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cache.write.claims import writing
from logitcache.config.recipe import Component
from logitcache.errors import CacheError, KilledWorkerError, LogitCacheError, MismatchError, RecipeError
from logitcache.models import weights_digest
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import ignore_signals
from logitcache.stage_one.inputs import build_teachers, open_images
from logitcache.stage_one.precompute import Done, fill
from logitcache.stage_one.preparation import Plan
from logitcache.stage_one.share import WHOLE, Share
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views

PATIENCE, PAUSE = 30.0, 0.1
"""Seconds to wait for a shard that another process of this machine has claimed, and between asking for it."""


class Filler(Protocol):
    """What all shards of a job need, opened."""

    def fill(self, shards: Sequence[Shard], done: Done) -> list[Shard]:
        """Compute what nobody else has, and wait a while for what somebody has; returns what is committed."""

    def close(self) -> None:
        """End what was started."""


class Work(Protocol):
    """A cache to fill, as a value that can be pickled: shards are handed out apart."""

    @property
    def name(self) -> str:
        """What tells it from others on one scheduler: clients of the same work share its tasks."""

    def open(self) -> Filler:
        """Open all that it needs."""


class Job(NamedTuple):
    """A cache to fill, whose shards are handed out apart; `threads` are torch's, None as they are.

    num_recorded: views that the cache had before it began to grow; 0 for a new one.
    """

    recipe: PrecomputeRecipe
    store: Store
    goal: Manifest
    num_recorded: int
    threads: int | None

    @property
    def name(self) -> str:
        """What tells it from others on one scheduler."""
        return name_of(self.store, self.threads, self.recipe, self.goal)

    def open(self) -> "_Opened":
        """Open images and teachers."""
        return _Opened(self)


def name_of(store: Store, threads: int | None, *parts: Component) -> str:
    """Return a name for the work of filling a cache as some components say."""
    texts = (str(store.path.absolute()), str(threads), *(part.model_dump_json() for part in parts))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class Refusal(NamedTuple):
    """An error that the user can mend, as a value: it is not tried again, and travels whatever its class takes."""

    kind: type[LogitCacheError]
    text: str

    @classmethod
    def of(cls, error: LogitCacheError) -> Self:
        """Keep an error and where it happened: the worker as Dask names it, its host and its process."""
        return cls(type(error), f"{error}\n  On worker: {_worker()}{platform.node()}, process {os.getpid()}")

    def error(self) -> LogitCacheError:
        """Return the error again."""
        return self.kind.__new__(self.kind, self.text)


def _worker() -> str:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # in no worker
        return ""
    return f"{worker.name} at {worker.address}, " if worker.name != worker.address else f"{worker.address}, "


class Outcome(NamedTuple):
    """What came of some shards: what was done here, which of them are committed by now, and what is to be mended."""

    done: Done
    committed: list[Shard]
    refusal: Refusal | None = None


def compute(key: str, job: bytes, shards: Sequence[Shard]) -> Outcome:
    """Fill shards, all of the same images, of pickled Work; `key` names what is opened for it in this process."""
    done = Done()
    with _computing:
        try:
            return Outcome(done, _open(key, job).fill(shards, done))
        except KilledWorkerError:
            _close()
            raise  # is tried again: the images are rendered by other processes
        except LogitCacheError as error:
            return Outcome(done, [], Refusal.of(error))
        except BaseException:
            _close()  # what failed in an unknown way may be unusable
            raise


def release(key: str) -> None:
    """Let go of what is opened for a job, unless it is in use."""
    if key in _opened and _computing.acquire(blocking=False):
        try:
            _close()
        finally:
            _computing.release()


def dask_setup(worker: object) -> None:
    """Leave signals to the client, which ends the workers that it started; Dask calls this in a worker's process."""
    ignore_signals()


class _Opened:
    """The images, the teachers and the processes that render: what all shards of a job need."""

    def __init__(self, job: Job) -> None:
        recipe = self._recipe = job.recipe
        _require_may_start(recipe.num_workers)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self._views = Views(open_images(recipe, None), recipe.views)
        self._teachers = build_teachers(recipe, {}, self._views, resolve_device(recipe.device))
        self._plan = _plan_here(job, self._views, self._teachers)
        self._loader = ViewLoader(self._views.answered(), recipe.num_workers, recipe.start_method)

    def fill(self, shards: Sequence[Shard], done: Done) -> list[Shard]:
        """Compute what nobody else has, and wait a while for what somebody has; returns what is committed."""
        recipe, plan = self._recipe, self._plan
        share = Share(plan.snapshot, shards, recipe.views_per_image, WHOLE)
        return filled(
            plan.store, share, lambda: fill(recipe, self._views, self._loader, self._teachers, plan, share, done)
        )

    def close(self) -> None:
        """End the processes that render."""
        self._loader.close()


def filled(store: Store, share: Share, fill: Callable[[], None]) -> list[Shard]:
    """Fill a share, and wait a while for what somebody else has of it; returns what is committed."""
    shards = [shard for group in share.groups for shard in group]
    deadline = time.monotonic() + PATIENCE
    with writing(store):
        while True:
            fill()
            committed = [shard for shard in shards if not share.missing(shard)]
            if len(committed) == len(shards) or time.monotonic() > deadline:
                return committed
            time.sleep(PAUSE)


_computing = threading.Lock()
"""Held while shards are computed: a worker of several threads has one device all the same."""

_opened: dict[str, Filler] = {}
"""At most one."""


def _open(key: str, job: bytes) -> Filler:
    if key not in _opened:
        _close()
        _opened[key] = pickle.loads(job).open()
    return _opened[key]


def _close() -> None:
    while _opened:
        _opened.popitem()[1].close()


def _plan_here(job: Job, views: Views, teachers: Sequence[Teacher]) -> Plan:
    """Return the plan of the client, of which no shard is pending.

    Raises unless cache, images, pixels and weights here are those of the client: a recipe names them by path.
    """
    store, goal = locate(str(job.store)), job.goal
    try:
        recorded = Snapshot.read(store)
    except CacheError as error:
        raise CacheError(f"{error}\n  Fix: a file system that client and workers share, at the same path") from error
    if recorded.manifest.canaries != goal.canaries or recorded.manifest.fingerprint != goal.fingerprint:
        raise MismatchError(
            f"{store} is another cache here than at the client. Fix: a file system that client and workers share"
        )
    filled = recorded.of(goal)
    cache = Cache(filled)
    cache.require_dataset(views.dataset)
    cache.require_canaries(views)
    for teacher in teachers:
        here, wanted = weights_digest(teacher.classifier.module), goal.teachers[teacher.name].weights
        if here != wanted:
            raise MismatchError(
                f"teachers.{teacher.name}: its weights are {here[:8]}… here, and {wanted[:8]}… at the client.\n"
                "  Fix: let the recipe name the same file for all"
            )
    if not job.num_recorded:
        return Plan.of(filled, [])
    before = recorded.manifest.restricted(job.num_recorded, recorded.manifest.targets)
    return Plan.of(filled, [], recorded.of(before))


def _require_may_start(num_workers: int) -> None:
    if num_workers and multiprocessing.current_process().daemon:
        raise RecipeError(
            f"num_workers is {num_workers}, but under Dask's nanny this worker may start no processes.\n"
            "  Fix: start workers with `dask worker --no-nanny`, or DASK_DISTRIBUTED__WORKER__DAEMON=False in their "
            "environment; or render in the worker itself: --set num_workers=0"
        )
