"""Workers of a cluster: a function that each opens once in its process, and how those of this machine start.

A Dask cluster of this machine has one process for each worker, with a GPU of its own if there are any.
"""

import contextlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from logitcache.errors import KilledWorkerError, LogitCacheError, RecipeError, rebuilt
from logitcache.runtime.console import logger
from logitcache.runtime.device import num_cores
from logitcache.runtime.stopping import ignore_signals

if TYPE_CHECKING:
    from distributed import SpecCluster


Opener = Callable[[], AbstractContextManager[Callable[[Any], Any]]]
"""Opens a function in a worker, with what it keeps between calls. It can be pickled."""


_calling = threading.Lock()
"""Held during a call: a worker of several threads has one device all the same."""

_opened: dict[str, Callable[[Any], Any]] = {}
"""At most one function, by name."""

_held = contextlib.ExitStack()

PRELOAD = __name__
"""The module whose `dask_setup` each worker of this machine calls as it starts."""

GPU = "GPU"
"""The resource that a worker with a GPU has one of."""

STARTS = 10
"""How often in a row workers of this machine may end before one has started."""

_NANNY = {
    "distributed.worker.daemon": False,  # workers start the processes that render
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}
"""Changed settings of Dask's nannies: with their allocator, a teacher on the CPU takes twice the time."""

Pause = Callable[[float], None]
"""Waits some seconds; raises if the user asks for a stop, or the workers of this machine cannot be started."""


def call(name: str, opener: bytes, threads: int | None, item: Any) -> Any:
    """Apply a function to an item, with so many threads of torch; `opener` is a pickled Opener, opened once by name.

    A user's error is returned, so that Dask does not retry it.
    """
    with _calling:
        try:
            if name not in _opened:
                _close_function()
                if threads is not None:
                    torch.set_num_threads(threads)
                _opened[name] = _held.enter_context(pickle.loads(opener)())
            return _opened[name](item)
        except KilledWorkerError:
            _close_function()
            raise  # Dask retries it: other processes render the images then
        except LogitCacheError as error:
            return located(error)
        except BaseException:
            _close_function()  # what failed in an unknown way may be unusable
            raise


def located(error: LogitCacheError) -> LogitCacheError:
    """Add the place of an error: the worker as Dask names it, its host and its process."""
    return rebuilt(type(error), f"{error}\n  On worker: {_worker()}{platform.node()}, process {os.getpid()}")


def _worker() -> str:
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # in no worker
        return ""
    return f"{worker.name} at {worker.address}, " if worker.name != worker.address else f"{worker.address}, "


def release(name: str) -> None:
    """Close a function, unless it is in use."""
    if name in _opened and _calling.acquire(blocking=False):
        try:
            _close_function()
        finally:
            _calling.release()


def _close_function() -> None:
    _opened.clear()
    _held.close()


def dask_setup(worker: object) -> None:
    """Leave signals to the client, which ends the workers that it started; Dask calls this in a worker's process."""
    ignore_signals()


class Workers(NamedTuple):
    """A cluster that runs: its scheduler's address, the threads of torch in each worker, and what to wait with."""

    address: str
    threads: int | None
    pause: Pause


@contextlib.contextmanager
def local_cluster(workers: int, device: torch.device, pause: Pause) -> Iterator[Workers]:
    """Start workers on this machine, each with a GPU if `device` is one, and end them afterwards.

    To wait with `pause` starts workers again that were killed as they started; raises KilledWorkerError if that goes
    on.
    """
    import dask
    from distributed import Scheduler, SpecCluster

    from logitcache.stage_one.cluster.nanny import StartingNanny

    options: dict[str, Any] = {
        "nthreads": 1,
        "memory_limit": 0,
        "preload": [PRELOAD],
        "silence_logs": logging.CRITICAL,
    }
    given = enumerate(_own(workers, device))
    specs = {number: {"cls": StartingNanny, "options": {**options, **own}} for number, own in given}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    in_vain = 0
    with dask.config.set(_NANNY), contextlib.ExitStack() as ending:
        # Without workers at first: one that is killed while it starts would end the cluster.
        cluster = SpecCluster(scheduler=scheduler, silence_logs=logging.CRITICAL)
        ending.callback(_close, cluster)
        cluster.worker_spec.update(specs)

        def pause_and_start(seconds: float) -> None:
            nonlocal in_vain
            pause(seconds)
            running, failed = cluster.sync(_start_missing, cluster)
            in_vain = failed + (0 if running else in_vain)
            if in_vain > STARTS:
                raise KilledWorkerError(
                    f"worker processes were killed or ended as they started, {in_vain} times in a row: memory may have "
                    "run out. Fix: fewer --workers; what is committed is kept, and the same command continues"
                )

        pause_and_start(0.0)
        logger.info(f"{workers} workers; dashboard at {cluster.dashboard_link}")
        yield Workers(cluster.scheduler_address, max(1, num_cores() // workers), pause_and_start)


async def _start_missing(cluster: "SpecCluster") -> tuple[bool, bool]:
    """Start workers that are not there: a nanny restarts its worker, but not one that is killed as it starts.

    Returns whether any ran before, and whether one failed to start.
    """
    for name, nanny in list(cluster.workers.items()):
        if nanny.status.name in ("closed", "failed"):
            del cluster.workers[name]
    is_running = any(nanny.status.name == "running" for nanny in cluster.workers.values())
    if len(cluster.workers) < len(cluster.worker_spec):
        try:
            await cluster._correct_state()
        except Exception:  # whatever ended a worker: its nanny has a status, which the next look finds
            return is_running, True
    return is_running, False


def _close(cluster: "SpecCluster") -> None:
    """Close a cluster; workers that do not end in time, as on a loaded machine, end with this process."""
    try:
        cluster.close()
    except TimeoutError:
        logger.info("workers did not end in time; they end with this process, and nothing that is committed is lost")


def _own(workers: int, device: torch.device) -> list[dict[str, Any]]:
    """Return what each worker has of its own: a GPU, if the device is one."""
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
