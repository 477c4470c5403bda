"""A Dask cluster of this machine: one process for each worker, with a GPU of its own if there are any."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from logitcache.errors import KilledWorkerError, RecipeError
from logitcache.runtime.console import logger
from logitcache.stage_one.cluster import worker

if TYPE_CHECKING:
    from distributed import SpecCluster

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
    from distributed import Nanny, Scheduler, SpecCluster

    options: dict[str, Any] = {
        "nthreads": 1,
        "memory_limit": 0,
        "preload": [worker.__name__],
        "silence_logs": logging.CRITICAL,
    }
    specs = {number: {"cls": Nanny, "options": {**options, **own}} for number, own in enumerate(_own(workers, device))}
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
        yield Workers(cluster.scheduler_address, max(1, len(os.sched_getaffinity(0)) // workers), pause_and_start)


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
