"""Train the groups of a sweep on a Dask cluster: each is a task, and each worker trains one at a time."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from logitcache.errors import CacheError, Stopped
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import resolve_device
from logitcache.runtime.stopping import StopFlag
from logitcache.stage_one.cluster.cluster import FIRST, Cluster, LostScheduler, results, running
from logitcache.stage_one.cluster.workers import Workers
from logitcache.sweeps.groups import Group, forget
from logitcache.sweeps.outcomes import outcome_of
from logitcache.sweeps.stream import ShowEpoch, train_group


class SweepWorkers:
    """The workers of a sweep: of this machine, each with a GPU of its own if there are any, or of a scheduler.

    Those of this machine are started when they are first needed, and end with the context. Workers see the paths of the
    recipes as this process does, and start in the same folder.
    """

    def __init__(self, cluster: Cluster, stop: StopFlag) -> None:
        """Start nothing yet; `stop` is the caller's flag."""
        self._cluster, self._stop, self._ending = cluster, stop, contextlib.ExitStack()
        self._started: Workers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def train(self, groups: Sequence[Group], out: Path, until: int | None, show: ShowEpoch) -> None:
        """Train groups, each on a worker, until so many epochs are done, or to their end.

        Raises Stopped, CacheError if the scheduler is lost or runs do not appear here.
        """
        stated = [str(out.absolute()), str(until), *(group.name for group in groups)]
        name = hashlib.sha256("\0".join(stated).encode()).hexdigest()
        opener = functools.partial(_trainer, out, until)
        keys = [f"students-{group.name}-{name[:16]}" for group in groups]
        try:
            workers = self._workers(groups[0].members[0].recipe.device)
            found = results(workers, opener, groups, keys, name, patience=FIRST, on_gpus=True)
            with contextlib.closing(found):
                for number, _ in track(found, "train", len(groups), "groups"):
                    _show(groups[number], show)
        except LostScheduler as error:
            raise CacheError(f"{error}. Fix: start the scheduler, then the same command again") from error
        except Stopped:
            self._ending.close()
            for group in groups:  # its workers are ended: not the system has killed them
                forget(group)
            raise

    def _workers(self, device: str) -> Workers:
        """Return the workers, started by now."""
        if self._started is None:
            self._started = self._ending.enter_context(running(self._cluster, resolve_device(device), self._pause))
        return self._started

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise self._stop.stopped("stopped")


def _show(group: Group, show: ShowEpoch) -> None:
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
