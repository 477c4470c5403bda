"""Values that processes compute apart, gathered in order: here, on workers of this machine, or on a running cluster."""

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from logitcache.errors import CacheError, LogitCacheError
from logitcache.runtime.console import track
from logitcache.runtime.stopping import StopFlag, stop_flag
from logitcache.stage_one.cluster.client import FIRST, RETRIES, require_cluster
from logitcache.stage_one.cluster.dask import LostScheduler, arriving, connected, local_cluster, result_of
from logitcache.stage_one.cluster.worker import Refusal

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
R = TypeVar("R")


class Cluster(NamedTuple):
    """Where to compute: at the address of a scheduler, on so many workers of this machine, or, without either, here."""

    scheduler: str | None = None
    workers: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether this process computes itself."""
        return self.scheduler is None and self.workers is None


HERE = Cluster()


def gathered(function: Callable[[T], R], tasks: Sequence[T], what: str, unit: str, cluster: Cluster) -> Iterator[R]:
    """Yield a function's values of tasks in their order, each as soon as those before it are there.

    `function` can be pickled, depends on nothing but its argument, and takes the CPU alone. Raises what it raises,
    RecipeError where no scheduler answers, CacheError where the scheduler is lost, Stopped after SIGTERM or Ctrl-C.
    """
    if cluster.is_here:
        yield from map(function, track(tasks, what, len(tasks), unit))
        return
    require_cluster(cluster.scheduler, cluster.workers)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(stop_flag())
        address, threads, workers_live = cluster.scheduler, None, _no_workers
        if cluster.workers is not None:
            address, threads, workers_live = held.enter_context(local_cluster(cluster.workers, torch.device("cpu")))
        assert address is not None
        check = functools.partial(_check, stop, what, workers_live)
        client = held.enter_context(contextlib.closing(connected(address, FIRST, check)))
        answers = _answers(client, pickle.dumps(function), tasks, threads, check)
        try:
            yield from _in_order(track(answers, what, len(tasks), unit))
        except LostScheduler as error:
            raise CacheError(f"{what}: {error}. Fix: start the scheduler, then the same command again") from error


class _Answer(NamedTuple):
    number: int
    value: Any
    refusal: Refusal | None = None


def _no_workers() -> None:
    """Look after no workers: those of a running cluster are not this process's."""


def _check(stop: StopFlag, what: str, workers_live: Callable[[], None]) -> None:
    if stop:
        raise stop.stopped(f"stopped: a {what} keeps nothing of what it has begun")
    workers_live()


def _answers(
    client: "Client", function: bytes, tasks: Sequence[Any], threads: int | None, check: Callable[[], None]
) -> Iterator[_Answer]:
    """Yield answers as they arrive."""
    count = len(tasks)
    try:
        given = ([function] * count, [threads] * count, range(count), tasks)
        futures = client.map(_answer, *given, pure=False, retries=RETRIES)
    except OSError as error:
        raise LostScheduler(f"the scheduler of {client} is gone: {error}") from error
    for future in arriving(client, futures, check):
        answer: _Answer = result_of(future)
        future.release()
        if answer.refusal is not None:
            raise answer.refusal.error()
        yield answer


def _in_order(answers: Iterator[_Answer]) -> Iterator[Any]:
    """Yield values by number. Tasks are begun in order, so that few wait for one before them."""
    early: dict[int, Any] = {}
    following = 0
    for answer in answers:
        early[answer.number] = answer.value
        while following in early:
            yield early.pop(following)
            following += 1


def _answer(function: bytes, threads: int | None, number: int, task: Any) -> _Answer:
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return _Answer(number, _opened(function)(task))
    except LogitCacheError as error:
        return _Answer(number, None, Refusal.of(error))


@functools.lru_cache(maxsize=1)
def _opened(function: bytes) -> Callable[[Any], Any]:
    """Return the function, with what it keeps open between tasks."""
    found: Callable[[Any], Any] = pickle.loads(function)
    return found
