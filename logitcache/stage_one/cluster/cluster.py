"""Call a function for many items on a Dask cluster: workers of this machine, or those of a running scheduler.

Dask retries what fails, and hands the items of a worker that dies to others.
"""

import contextlib
import functools
import importlib.util
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch

from logitcache.errors import CacheError, LogitCacheError, MissingExtraError, RecipeError
from logitcache.runtime.console import logger, track
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.cluster.workers import GPU, Opener, Pause, Workers, call, local_cluster, release

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often Dask calls a function again after an error that is no user's."""

POLL, ATTEMPT, REMINDER = 0.2, 5.0, 30.0
"""Seconds between looks for a signal, for one attempt to connect, and between reminders that there are no workers."""

FIRST = 30.0
"""Seconds to wait for a scheduler that was not reached before."""


class LostScheduler(Exception):
    """The scheduler is gone, and with it the tasks that it had."""


class Cluster(NamedTuple):
    """Where to compute: at the address of a scheduler, on so many workers of this machine, or, without either, here."""

    scheduler: str | None = None
    workers: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether this process computes itself."""
        return self.scheduler is None and self.workers is None

    def checked(self) -> Self:
        """Raise unless at most one kind of cluster is named, and Dask is installed for it."""
        if self.scheduler is not None and self.workers is not None:
            raise RecipeError("a cluster is either at an address or of this machine. Fix: --scheduler or --workers")
        if not self.is_here and importlib.util.find_spec("distributed") is None:
            raise MissingExtraError("a Dask cluster", "cluster")
        return self


HERE = Cluster()


def running(cluster: Cluster, device: torch.device, pause: Pause) -> contextlib.AbstractContextManager[Workers]:
    """Start workers of this machine, each with a GPU if `device` is one, or name those of the scheduler."""
    if cluster.workers is not None:
        return local_cluster(cluster.workers, device, pause)
    assert cluster.scheduler is not None
    return contextlib.nullcontext(Workers(cluster.scheduler, None, pause))


def results(
    workers: Workers,
    opener: Opener,
    items: Sequence[Any],
    keys: Sequence[str],
    name: str,
    *,
    patience: float,
    on_gpus: bool = False,
) -> Generator[tuple[int, Any], None, None]:
    """Yield the number of each item and what the opened function returns for it, as results arrive.

    `name` identifies the function on a scheduler, where clients share tasks of the same key. With `on_gpus` only
    workers with GPUs are used, if there are any. Raises what the function raises, RecipeError if no scheduler answers
    in `patience` seconds, LostScheduler if it is lost later.
    """
    pause = workers.pause
    with contextlib.closing(_connected(workers.address, patience, pause)) as client:
        found = _workers(client, pause)
        if busy := [worker for worker in found.values() if worker["nthreads"] > 1]:
            logger.info(
                f"{len(busy)} workers have several threads, of which one at a time computes: --nthreads 1 is better"
            )
        resources = {GPU: 1} if on_gpus and any(GPU in worker["resources"] for worker in found.values()) else None
        function = functools.partial(call, name, pickle.dumps(opener), workers.threads)
        try:
            futures = client.map(function, items, key=list(keys), resources=resources, retries=RETRIES)
        except OSError as error:
            raise LostScheduler(f"the scheduler of {client} is gone: {error}") from error
        numbers = {future.key: number for number, future in enumerate(futures)}
        for future in _ended(client, futures, pause):
            value = _result(future)
            future.release()
            if isinstance(value, LogitCacheError):
                raise value
            yield numbers[future.key], value
        with contextlib.suppress(OSError):  # all is done, even if the scheduler is gone by now
            client.run(release, name, on_error="ignore")


def gathered(function: Callable[[T], R], items: Sequence[T], what: str, unit: str, cluster: Cluster) -> Iterator[R]:
    """Yield a function's values of items in their order, each as soon as those before it are there.

    `function` can be pickled, depends on nothing but its argument, and takes the CPU alone. Raises what it raises,
    RecipeError if no scheduler answers, CacheError if the scheduler is lost, Stopped after SIGTERM or Ctrl-C.
    """
    if cluster.checked().is_here:
        yield from map(function, track(items, what, len(items), unit))
        return
    name = uuid.uuid4().hex
    keys = [f"{what}-{number}-{name}" for number in range(len(items))]
    with stop_flag() as stop:

        def pause(seconds: float) -> None:
            if stop.wait(seconds):
                raise stop.stopped(f"stopped: a {what} keeps nothing of what it has begun")

        with running(cluster, torch.device("cpu"), pause) as workers:
            opener: Opener = functools.partial(contextlib.nullcontext, function)  # type: ignore[assignment]
            try:
                with contextlib.closing(results(workers, opener, items, keys, name, patience=FIRST)) as found:
                    yield from _in_order(track(found, what, len(items), unit))
            except LostScheduler as error:
                raise CacheError(f"{what}: {error}. Fix: start the scheduler, then the same command again") from error


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Yield values by number. Tasks begin in order, so that few wait for one before them."""
    early: dict[int, Any] = {}
    following = 0
    for number, value in results:
        early[number] = value
        while following in early:
            yield early.pop(following)
            following += 1


def _connected(address: str, seconds: float, pause: Pause) -> "Client":
    """Return a client of the scheduler at an address; raise RecipeError if none answers in time."""
    from distributed import Client
    from distributed.comm import get_address_host_port

    deadline = time.monotonic() + seconds
    while True:
        try:
            # Probe first: Client logs a traceback if nothing listens.
            socket.create_connection(get_address_host_port(address), timeout=ATTEMPT).close()
            return Client(address, timeout=ATTEMPT, set_as_default=False)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"--scheduler {address!r}: {error}. Fix: an address as in tcp://host:8786") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"no scheduler answers at {address}: {error}. Fix: start one (`dask scheduler`), or correct the "
                    "address; what is committed is kept, and the same command continues"
                ) from error
        pause(POLL)


def _workers(client: "Client", pause: Pause) -> dict[str, Any]:
    """Wait for the first workers, and return all by address."""
    reminded = 0.0
    while not (workers := dict(client.scheduler_info(n_workers=-1)["workers"])):
        if client.status != "running":
            raise LostScheduler(f"the scheduler of {client} is gone")
        if time.monotonic() - reminded > REMINDER:
            reminded = time.monotonic()
            logger.info("the scheduler has no workers, waiting for the first")
        pause(POLL)
    return workers


def _ended(client: "Client", futures: "Sequence[Future]", pause: Pause) -> "Iterator[Future]":
    """Yield futures as they end, in whatever way.

    Waits between looks, as neither a signal nor workers that cannot start would end a blocking wait for a result.
    """
    from distributed import as_completed

    ended, checked = as_completed(futures, loop=client.loop), time.monotonic()
    while not ended.is_empty():
        pause(0.0 if ended.has_ready() else POLL)
        yield from ended.next_batch(block=False)
        if time.monotonic() - checked > REMINDER:
            _workers(client, pause)
            checked = time.monotonic()


def _result(future: "Future") -> Any:
    """Return what a task returned; raise what it still raised after retries, LostScheduler if the task is lost."""
    from distributed import KilledWorker

    status = future.status
    try:
        return future.result()
    except KilledWorker as error:
        raise CacheError(
            f"{error.allowed_failures + 1} workers died, one after the other, while they computed {error.task}: most "
            "often there was not enough memory. Fix: a smaller batch_size, fewer workers on a machine, fewer "
            "num_workers; what is committed is kept, and the same command continues"
        ) from error
    except (CancelledError, OSError) as error:
        if status == "error":
            raise
        raise LostScheduler(f"the scheduler at {future.client} is gone: {error}") from error
