"""Fill a cache on a Dask cluster: the client prepares and finishes it, workers compute its shards.

The scheduler hands every group of shards to one worker, and to another if that one dies. What is committed lies on the
disk: client, scheduler and workers may all be killed and started again.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from logitcache.cache.format.growth import read_growth
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cache.write.writer_locks import writing
from logitcache.config.recipe import Component
from logitcache.errors import CacheError, MismatchError
from logitcache.runtime.console import logger, track
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.claims import Claims
from logitcache.stage_one.cluster.cluster import FIRST, Cluster, LostScheduler, results, running
from logitcache.stage_one.cluster.workers import Pause, Workers
from logitcache.stage_one.loop import Done, ShardTask, fill, stopped_message
from logitcache.stage_one.todo import Todo
from logitcache.store.shards import Shard

AGAIN, LOSSES = 300.0, 5
"""Seconds to wait for a scheduler that was lost, and how often in a row it may be lost with nothing committed."""

VISIBLE = 90.0
"""Seconds after which a network disk shows here what a worker wrote."""

PATIENCE = 30.0
"""Seconds that a worker waits for a shard that another process of its machine has claimed."""

SHARED = "Fix: a file system that client and workers share, at the same path"


class TaskOpener(NamedTuple):
    """Opens the task of a recipe in a worker, whose groups are shards of up to `views_per_image` views.

    It can be pickled.
    """

    label: str
    recipe: Component
    open: Callable[[], AbstractContextManager[ShardTask]]
    views_per_image: int = 1


def fill_on_cluster(
    cluster: Cluster, opener: TaskOpener, device: torch.device, todo: Todo, claims: Claims, done: Done
) -> None:
    """Hand out groups of shards until all are committed, or none that is left can be claimed."""
    with stop_flag() as stop:

        def pause(seconds: float) -> None:
            if stop.wait(seconds):
                raise stop.stopped(stopped_message(todo, done))

        if claims.groups:
            with running(cluster, device, pause) as workers:
                _hand_out(workers, opener, todo, claims, done)
        claims.wait(pause)  # for the shards of other parts


def _hand_out(workers: Workers, opener: TaskOpener, todo: Todo, claims: Claims, done: Done) -> None:
    texts = str(todo.store.path.absolute()), opener.recipe.model_dump_json(), todo.goal.model_dump_json()
    name = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    function = functools.partial(shard_filler, opener)
    groups, patience, losses = claims.groups, FIRST, 0
    while groups:
        before = done.shards
        keys = [f"shard-view{group[0].view}-{group[0].start // todo.layout.shard_rows}-{name}" for group in groups]
        found = results(workers, function, groups, keys, name, patience=patience, on_gpus=True)
        unit = "shards" if all(len(group) == 1 for group in groups) else "groups of shards"
        try:
            with contextlib.closing(found):
                for _, (more, committed) in track(found, opener.label, len(groups), unit):
                    done.add(more)
                    _require_visible(committed, todo, claims, workers.pause)
            losses = 0
        except LostScheduler as error:
            logger.info(f"the scheduler at {workers.address} is gone, waiting for it to come back")
            patience, losses = AGAIN, 1 if done.shards > before else losses + 1
            if losses > LOSSES:
                raise CacheError(f"{error}. {todo.store} is incomplete. Fix: the same command continues") from error
        groups = claims.grouped([shard for group in groups for shard in group if claims.missing(shard)])
        # Shards that no worker could claim are left to the processes that have them, as by a single process.
        if not losses and done.shards == before and not claims.wait(workers.pause):
            return


def _require_visible(committed: Sequence[Shard], todo: Todo, claims: Claims, pause: Pause) -> None:
    """Wait until what workers committed is seen here too; raise CacheError if it never is."""
    deadline = time.monotonic() + VISIBLE
    while unseen := [shard for shard in committed if claims.missing(shard)]:
        if time.monotonic() > deadline:
            view, start, stop = unseen[0]
            where = todo.store.path.absolute() if todo.store.is_local else todo.store
            raise CacheError(
                f"a worker has committed view {view} rows {start}..{stop} to {where}, which is not there at the "
                f"client. {SHARED}"
            )
        pause(0.1)


@contextlib.contextmanager
def shard_filler(opener: TaskOpener) -> Iterator[Callable[[Sequence[Shard]], tuple[Done, list[Shard]]]]:
    """Open the task of a recipe in a worker, and yield what fills shards of the same images with it.

    It returns what was done, and which of the shards are committed by now.
    """
    with opener.open() as task:

        def filler(shards: Sequence[Shard]) -> tuple[Done, list[Shard]]:
            done = Done()
            claims = Claims(task.todo.snapshot, shards, opener.views_per_image, patience=PATIENCE)
            with writing(task.todo.store):
                fill(task, claims, done)
            return done, [shard for shard in shards if not claims.missing(shard)]

        yield filler


def open_same(location: str, wanted: Manifest) -> Snapshot:
    """Open, in a worker, a cache of the client; raise unless both manifests describe the same cache."""
    store = locate(location)
    try:
        opened = Snapshot.read(store)
    except CacheError as error:
        raise CacheError(f"{error}\n  {SHARED}") from error
    found = opened.manifest
    if wanted.num_images > found.num_images:
        growing = read_growth(store, found)  # as the client has noted
        found = found.model_copy(update={"fingerprint": growing.fingerprint, "appended": growing.appended})
    views = min(found.views.num_views, wanted.views.num_views)
    common = {
        name: [target for target in targets if target in found.targets[name]]
        for name, targets in wanted.targets.items()
        if name in found.targets
    }
    if found.restricted(views, common).content_digest() != wanted.restricted(views, common).content_digest():
        raise MismatchError(f"{store} is another cache here than at the client. {SHARED}")
    return opened.of(wanted)
