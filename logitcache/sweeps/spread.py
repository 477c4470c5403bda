"""Train the groups of a sweep on a Dask cluster: each is a task, and each worker trains one at a time."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from logitcache.errors import CacheError, Stopped
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import StopFlag
from logitcache.stage_one.cluster.cluster import FIRST, Cluster, LostScheduler, results, running
from logitcache.sweeps.groups import Group, forget
from logitcache.sweeps.outcomes import outcome_of
from logitcache.sweeps.stream import Shown, train_group


def train_on_cluster(
    cluster: Cluster, groups: Sequence[Group], out: Path, until: int | None, stop: StopFlag, show: Shown
) -> None:
    """Train groups on workers of this machine, each with a GPU of its own if there are any, or on a scheduler's.

    Workers see the paths of the recipes as this process does, and start in the same folder. Raises Stopped, CacheError
    if the scheduler is lost or runs do not appear here.
    """

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise stop.stopped("stopped")

    name = hashlib.sha256("\0".join([str(out.absolute()), str(until), *(g.name for g in groups)]).encode()).hexdigest()
    opener = functools.partial(_trainer, out, until)
    keys = [f"students-{group.name}-{name[:16]}" for group in groups]
    device = resolve_device(groups[0].members[0].recipe.device)
    try:
        with running(cluster, device, pause) as workers:
            found = results(workers, opener, groups, keys, name, patience=FIRST, on_gpus=True)
            with contextlib.closing(found):
                for number, _ in track(found, "train", len(groups), "groups"):
                    _show(groups[number], show)
    except LostScheduler as error:
        raise CacheError(f"{error}. Fix: start the scheduler, then the same command again") from error
    except Stopped:
        for group in groups:  # its workers are ended: not the system has killed them
            forget(group)
        raise


def _show(group: Group, show: Shown) -> None:
    """Show how the runs of a group ended; raise CacheError if they are not here."""
    for member in group.members:
        outcome = outcome_of(member)
        if outcome.state == "waiting":
            raise CacheError(
                f"a worker has trained {member.recipe.out}, which is not there at the client. Fix: a file system that "
                "client and workers share, at the same path, and workers that start in the same folder"
            )
        if outcome.failure is not None:
            show(member.run, outcome.failure)
        elif outcome.rows:
            show(member.run, outcome.rows[-1])


@contextlib.contextmanager
def _trainer(out: Path, until: int | None) -> Iterator[Callable[[Group], None]]:
    """Yield, in a worker, what trains a group."""

    def train(group: Group) -> None:
        train_group(group, out, until, None, lambda run, found: logger.debug(f"{run}: {found}"))

    yield train
