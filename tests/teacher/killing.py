"""Kill precompute at random moments: a program that is run apart, since it forks and must have no threads.

    python -m tests.teacher.killing DIRECTORY

One process imports torch once; every run is a fork of it. Prints a JSON list with what was found after each resume.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from logitcache.teacher.precompute import precompute
from tests.cache.made import DENSE16, TOP2_PACKED, Linear, Pixels, contents, recipe, stamps, teacher

NUM_POINTS, NUM_TIMES = 15, 10
RECORDED = {"row_checksums": True, "record_parameters": True}
TEACHERS = {"first": Linear(16), "second": Linear(7, seed=1)}


def run(path: Path) -> int:
    """Precompute six shards of two teachers and of what is recorded; returns how many were written."""
    teachers = {"first": teacher(DENSE16), "second": teacher(TOP2_PACKED)}
    plan = recipe(path, teachers=teachers, shard_rows=128, batch_size=64, **RECORDED)
    return precompute(plan, teachers=TEACHERS, dataset=Pixels(300)).shards_written


def forked(action: Callable[[], int]) -> int:
    """Start a child that does something and exits with its result; returns its id."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = action()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counting(limit: int | None, report: Path | None, action: Callable[[], int]) -> int:
    """Count the calls that change a directory or the disk; SIGKILL this process at one of them."""
    calls = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if limit is not None and calls > limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, name, call)

    for name in ("replace", "fsync", "mkdir", "open", "unlink"):
        counted(name)
    status = action()
    if report:
        report.write_text(str(calls))
    return status


def killed_at_time(path: Path, seconds: float) -> None:
    child = forked(lambda: run(path))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    ended(child)


def committed(path: Path) -> list[str]:
    """List the files of the shards of which everything is committed."""
    names = [{p.name[:5] for p in path.glob(f"{name}.commits/c.*.0.0")} for name in (*TEACHERS, "views")]
    shards = set.intersection(*names)
    return [str(p.relative_to(path)) for p in path.glob("*/c.*.*.0*") if p.name[:5] in shards and p.suffix == ".0"]


def outcome(kind: str, path: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    kept = {name: stamp for name, stamp in stamps(path).items() if name in committed(path)} if path.exists() else {}
    status = ended(forked(lambda: run(path)))
    after = stamps(path)
    return {
        "kind": kind,
        "committed": len({name.split("/")[1][:5] for name in kept}),
        "written": status,
        "identical": contents(path) == expected,
        "kept": all(after[name] == stamp for name, stamp in kept.items()),
        "beside": sorted(os.listdir(path.parent)),
    }


def main(root: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    generator = random.Random(7)
    assert ended(forked(lambda: counting(None, root / "calls", lambda: run(root / "whole")))) == 6
    started = time.perf_counter()
    assert ended(forked(lambda: run(root / "again"))) == 6
    seconds = time.perf_counter() - started
    calls = int((root / "calls").read_text())
    expected = contents(root / "whole")
    found = []
    for number in range(NUM_POINTS + NUM_TIMES):
        path = root / str(number) / "c.zarr"
        path.parent.mkdir()
        # The second kill hits the run that continues.
        for _ in range(1 + number % 2):
            if number < NUM_POINTS:
                # Spread over the whole life; a run that continues makes fewer calls.
                point = generator.randrange(calls * number // NUM_POINTS, calls * (number + 1) // NUM_POINTS)
                child = forked(lambda point=point, path=path: counting(point, None, lambda: run(path)))  # type: ignore[misc]
                assert ended(child) in (-signal.SIGKILL, 0, 1, 2, 3, 4, 5, 6)
            else:
                killed_at_time(path, generator.uniform(0, seconds))
        found.append(outcome("point" if number < NUM_POINTS else "time", path, expected))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
