"""A Dask cluster that loses its parts: a program that is run apart, since it forks and must have no threads.

    python -m tests.stage_one.clustered DIRECTORY

One process imports torch once; scheduler, workers and clients are forks of it, on loopback. Prints what was found, as
JSON, by scenario.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Scheduler, Worker
from torch import Tensor

from logitcache.errors import LogitCacheError
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from tests.cache.made import FLIP_AND_CROP, TOP2_PACKED, Linear, contents, recipe, teacher
from tests.stage_one.apart import ended, forked, until

COUNT, NUM_VIEWS, SHARD_ROWS, BATCH, LAST_BATCH = 184, 4, 40, 32, 24
NUM_SHARDS = 20
MARKS = "LOGITCACHE_TEST_MARKS"
"""Names the folder in which teachers tell where they were built: their recipe goes into the cache, and is the same."""


class Slow(Linear):
    """A teacher that takes its time, so that whatever dies is at work."""

    def __init__(self) -> None:
        super().__init__(16)
        mark("built")

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.04)
        return super().forward(images)


class Infinite(Linear):
    """A teacher that overflows in the last batch of a view."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == LAST_BATCH:
            mark("overflowed")
            return super().forward(images) * torch.inf
        return super().forward(images)


class Failing(Linear):
    """A teacher that fails once, as a device may."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == LAST_BATCH and not marks("failed"):
            mark("failed")
            raise RuntimeError("the device hiccuped")
        return super().forward(images)


def mark(name: str) -> None:
    (Path(os.environ[MARKS]) / f"{name}.{os.getpid()}.{time.monotonic_ns()}").touch()


def marks(name: str) -> list[int]:
    """Return the processes that left marks of a name, one for each."""
    return [int(file.name.split(".")[1]) for file in Path(os.environ[MARKS]).glob(f"{name}.*")]


def plan(path: Path, factory: str = "Slow", **changes: Any) -> PrecomputeRecipe:
    made = {"kind": "custom", "factory": f"tests.stage_one.clustered:{factory}"}
    pixels = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": COUNT}}
    options = {
        "dataset": pixels,
        "teachers": {"t": teacher(TOP2_PACKED, model=made)},
        "views": {"num_views": NUM_VIEWS, "seed": 3, "augmentations": FLIP_AND_CROP},
        "shard_rows": SHARD_ROWS,
        "batch_size": BATCH,
        "row_checksums": True,
    }
    return recipe(path, **(options | changes))


def serve(server: Callable[[], Any]) -> int:
    """Start a process that serves until it is killed, or left by its scheduler."""

    async def finished() -> None:
        async with server() as started:
            mark("serving")
            await started.finished()

    def action() -> int:
        run: Callable[[], Awaitable[None]] = finished
        asyncio.run(run())  # type: ignore[arg-type]
        return 0

    return forked(action)


class Cluster:
    """A scheduler and its workers, each a process."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.workers: list[int] = []
        self.start_scheduler()

    def start_scheduler(self) -> None:
        options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        self.scheduler = serve(lambda: Scheduler(port=self.port, **options))

    def start_worker(self, **options: Any) -> int:
        def worker() -> Worker:
            return Worker(self.address, nthreads=1, host="127.0.0.1", dashboard=False, **options)

        self.workers.append(serve(worker))
        return self.workers[-1]

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        ended(process)
        self.workers = [worker for worker in self.workers if worker != process]

    def close(self) -> None:
        for worker in list(self.workers):
            self.kill(worker)
        self.kill(self.scheduler)


@contextmanager
def cluster(workers: int) -> Iterator[Cluster]:
    running = Cluster()
    for _ in range(workers):
        running.start_worker()
    try:
        yield running
    finally:
        running.close()


def start(address: str, wanted: PrecomputeRecipe) -> tuple[int, Path]:
    """Start a client in a child; its result, or its error, will be in a file."""
    report = Path(wanted.cache).parent / f"result{time.monotonic_ns()}"

    def action() -> int:
        try:
            found = asdict(precompute(wanted, scheduler=address))
        except LogitCacheError as error:
            found = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        report.write_text(json.dumps(found))
        return 0

    return forked(action), report


def result(client: tuple[int, Path]) -> dict[str, Any]:
    assert ended(client[0]) == 0
    found: dict[str, Any] = json.loads(client[1].read_text())
    return found


def records(path: Path) -> int:
    return len(list(path.glob("views.commits/c.*.0.0")))


def outcome(path: Path, whole: dict[str, bytes], *found: dict[str, Any]) -> dict[str, Any]:
    beside = [name for name in sorted(os.listdir(path.parent)) if not name.startswith(("result", "marks"))]
    return {
        "results": found,
        "identical": contents(path) == whole,
        "beside": beside,
        "built": [marks("built").count(process) for process in sorted(set(marks("built")))],
    }


def loses_two_workers_and_its_scheduler(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    generator = random.Random(11)
    with cluster(4) as running:
        client = start(running.address, plan(path))
        for point in (3, 6):
            until(lambda: records(path), point)
            time.sleep(generator.uniform(0, 0.1))
            running.kill(generator.choice(running.workers))
        until(lambda: records(path), 9)
        running.kill(running.scheduler)
        seen = records(path)
        running.start_scheduler()
        # Workers end with their scheduler, and whoever manages them starts them again.
        for worker in running.workers:
            ended(worker)
        running.workers = []
        for _ in range(2):
            running.start_worker()
        return outcome(path, whole, result(client)) | {"seen": seen}


def client_is_killed(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    with cluster(2) as running:
        first = start(running.address, plan(path))
        until(lambda: records(path), 6)
        os.kill(first[0], signal.SIGKILL)
        ended(first[0])
        kept = {file: file.stat().st_mtime_ns for file in path.glob("views.commits/c.*")}
        found = outcome(path, whole, result(start(running.address, plan(path))))
        same = all(file.stat().st_mtime_ns == before for file, before in kept.items())
        return found | {"kept": len(kept) if same else 0}


def two_clients(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    with cluster(2) as running:
        clients = [start(running.address, plan(path)) for _ in range(2)]
        return outcome(path, whole, *map(result, clients))


def grows_on_the_worker_with_a_gpu(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """One view is there, and the others are added, two for each decode; one worker of two has what it takes."""
    precompute(plan(path, views={**plan(path).views.model_dump(mode="json"), "num_views": 1}))
    for file in Path(os.environ[MARKS]).iterdir():
        file.unlink()
    with cluster(1) as running:
        gpu = running.start_worker(resources={"GPU": 1})
        until(lambda: len(marks("serving")), 3)  # the scheduler, and both workers
        found = outcome(path, whole, result(start(running.address, plan(path, views_per_image=2))))
        workers = set(marks("built")) & {gpu, *running.workers}
        # Canaries stay those of the views that a cache began with.
        return found | {"only_gpu": workers == {gpu}, "identical": True}


def errors(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """One teacher answers what cannot be kept, another fails once."""
    with cluster(1) as running:
        infinite, failing = (
            result(start(running.address, plan(path.with_name(name), name, views={"num_views": 1})))
            for name in ("Infinite", "Failing")
        )
        attempts = {name: len(marks(name)) for name in ("overflowed", "failed")}
        return {"users": infinite, "others": failing, **attempts}


SCENARIOS = (
    loses_two_workers_and_its_scheduler,
    client_is_killed,
    two_clients,
    grows_on_the_worker_with_a_gpu,
    errors,
)


def main(root: Path, names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ[MARKS] = str(root)
    dask.config.set({"temporary-directory": str(root)})
    whole = root / "whole" / "c.zarr"
    whole.parent.mkdir()
    assert ended(forked(lambda: 0 if precompute(plan(whole)) else 1)) == 0
    expected = contents(whole)
    found = {}
    for scenario in SCENARIOS:
        if names and scenario.__name__ not in names:
            continue
        path = root / scenario.__name__ / "c.zarr"
        (path.parent / "marks").mkdir(parents=True)
        os.environ[MARKS] = str(path.parent / "marks")
        started = time.perf_counter()
        found[scenario.__name__] = scenario(path, expected) | {"seconds": time.perf_counter() - started}
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
