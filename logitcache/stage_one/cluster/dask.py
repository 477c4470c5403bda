"""What stage one needs of Dask: a connection, a cluster of this machine, and results as they arrive."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from logitcache.errors import CacheError, KilledWorkerError, RecipeError
from logitcache.runtime.console import logger
from logitcache.stage_one.cluster import worker

if TYPE_CHECKING:
    from distributed import Client, Future, SpecCluster

GPU = "GPU"
"""The resource that a worker with a GPU has one of."""

TICK, ATTEMPT, REMINDER = 0.2, 5.0, 30.0
"""Seconds between looking for a signal, for an attempt to connect, and between saying that there are no workers."""

Check = Callable[[], None]
"""Called while waiting: raises where the user asked for a stop."""


class LostScheduler(Exception):
    """The scheduler is gone, and with it what it was to hand out."""


def connected(address: str, seconds: float, check: Check) -> "Client":
    """Return a client of the scheduler at an address; raise RecipeError where none answers in time."""
    from distributed import Client
    from distributed.comm import get_address_host_port

    deadline = time.monotonic() + seconds
    while True:
        try:
            # A client that finds nobody ends noisily.
            socket.create_connection(get_address_host_port(address), timeout=ATTEMPT).close()
            return Client(address, timeout=ATTEMPT, set_as_default=False)
        except (ValueError, ImportError) as error:
            raise RecipeError(f"--scheduler {address!r}: {error}. Fix: an address as in tcp://host:8786") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"no scheduler answers at {address}: {error}. Fix: start one (`dask scheduler`), or mend the "
                    "address; what is committed is kept, and the same command continues"
                ) from error
        check()
        time.sleep(TICK)


def resources_of(client: "Client", check: Check) -> dict[str, float] | None:
    """Wait for the first workers; return what a task takes of one: a GPU where any of them says that it has one."""
    workers = _workers(client, check)
    busy = [address for address, found in workers.items() if found["nthreads"] > 1]
    if busy:
        logger.info(
            f"{len(busy)} workers have several threads, of which one at a time computes: --nthreads 1 is better"
        )
    return {GPU: 1} if any(GPU in found["resources"] for found in workers.values()) else None


def _workers(client: "Client", check: Check) -> dict[str, Any]:
    told = 0.0
    while True:
        workers: dict[str, Any] = dict(client.scheduler_info(n_workers=-1)["workers"])
        if workers:
            return workers
        check()
        if client.status != "running":
            raise LostScheduler(f"the scheduler of {client} is gone")
        if time.monotonic() - told > REMINDER:
            told = time.monotonic()
            logger.info("the scheduler has no workers, waiting for the first")
        time.sleep(TICK)


def arriving(client: "Client", futures: "Sequence[Future]", check: Check) -> "Iterator[Future]":
    """Yield futures as they end, in whatever way."""
    ended: SimpleQueue[Future] = SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    looked = time.monotonic()
    for _ in futures:
        while True:
            check()
            try:
                yield ended.get(timeout=TICK)
                break
            except Empty:
                if time.monotonic() - looked > REMINDER:
                    _workers(client, check)
                    looked = time.monotonic()


def result_of(future: "Future") -> Any:
    """Return what a task returned; raise what it raised to the end, LostScheduler where nobody knows of it any more."""
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


_NANNY = {
    "distributed.worker.daemon": False,  # workers start the processes that render
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,  # a teacher's memory would come and go
}
"""What is not to be as Dask's nannies have it: with their allocator, a teacher on the CPU takes twice the time."""


STARTS = 10
"""How often in a row workers of this machine may end before one has started."""


class Local(NamedTuple):
    """A cluster of this machine: its scheduler, and the threads that each worker has for torch.

    `check` starts workers again that were killed as they started; raises KilledWorkerError if that goes on.
    """

    address: str
    threads: int
    check: Check


@contextlib.contextmanager
def local_cluster(workers: int, device: torch.device) -> Iterator[Local]:
    """Start workers on this machine, each with a GPU where `device` is one, and end them afterwards."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    options: dict[str, Any] = {
        "nthreads": 1,
        "memory_limit": 0,
        "preload": [worker.__name__],
        "silence_logs": logging.CRITICAL,
    }
    specs = {number: {"cls": Nanny, "options": {**options, **own}} for number, own in enumerate(_own(workers, device))}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    with dask.config.set(_NANNY), contextlib.ExitStack() as ending:
        # Without workers at first: one that is killed while it starts would end the cluster.
        cluster = SpecCluster(scheduler=scheduler, silence_logs=logging.CRITICAL)
        ending.callback(_close, cluster)
        cluster.worker_spec.update(specs)
        started = _Starts(cluster)
        started.check()
        logger.info(f"{workers} workers; dashboard at {cluster.dashboard_link}")
        yield Local(cluster.scheduler_address, max(1, len(os.sched_getaffinity(0)) // workers), started.check)


def _close(cluster: "SpecCluster") -> None:
    """Close a cluster; workers that do not end in time, as on a loaded machine, end with this process."""
    try:
        cluster.close()
    except TimeoutError:
        logger.info("workers did not end in time; they end with this process, and nothing that is committed is lost")


class _Starts:
    """Starts workers of a cluster of this machine. A nanny starts its worker again, but not one killed in starting."""

    def __init__(self, cluster: "SpecCluster") -> None:
        self._cluster, self._in_vain = cluster, 0

    def check(self) -> None:
        """Start the workers that are missing; raise KilledWorkerError where they end again and again."""
        self._cluster.sync(self._start_missing)
        if self._in_vain > STARTS:
            raise KilledWorkerError(
                f"worker processes were killed or ended as they started, {self._in_vain} times in a row: memory may "
                "have run out. Fix: fewer --workers; what is committed is kept, and the same command continues"
            )

    async def _start_missing(self) -> None:
        workers = self._cluster.workers
        ended = [name for name, nanny in workers.items() if nanny.status.name in ("closed", "failed")]
        for name in ended:
            del workers[name]
        if any(nanny.status.name == "running" for nanny in workers.values()):
            self._in_vain = 0
        if len(workers) < len(self._cluster.worker_spec):
            try:
                await self._cluster._correct_state()
            except Exception:  # whatever ended a worker: its nanny has a status, which the next look finds
                self._in_vain += 1


def _own(workers: int, device: torch.device) -> list[dict[str, Any]]:
    """Return what each worker has of its own: a GPU, where the device is one."""
    if device.type != "cuda":
        return [{} for _ in range(workers)]
    count = torch.cuda.device_count()
    if workers > count:
        raise RecipeError(
            f"--workers {workers}: each takes a GPU, and this machine shows {count}. Fix: at most these, or "
            "--set device=cpu"
        )
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(number) for number in range(count)]
    return [{"env": {"CUDA_VISIBLE_DEVICES": name}, "resources": {GPU: 1}} for name in names[:workers]]
