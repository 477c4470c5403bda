"""Kill precompute at random moments: a program that is run apart, since it forks and must have no threads.

    python -m tests.stage_one.killing DIRECTORY [TIMES]

One process imports torch once; every run is a fork of it. Prints a JSON list with what was found after each resume, of
TIMES as many kills as the tests need.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from logitcache.cache.cache import open_cache
from logitcache.stage_one.precompute import precompute
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE16, FLIP_AND_CROP, TOP2_PACKED, Linear, Pixels, contents, recipe, stamps, teacher
from tests.stage_one.apart import ended, forked

NUM_POINTS, NUM_TIMES, NUM_GROWN, NUM_SHARDS = 9, 6, 5, 6
RECORDED = {"row_checksums": True, "record_parameters": True}
TEACHERS = {"first": Linear(16), "second": Linear(7, seed=1)}


def run(path: Path, num_views: int = 2, names: Sequence[str] = ("first", "second")) -> int:
    """Precompute six shards of two teachers and of what is recorded; returns how many were written."""
    entries = {"first": teacher(DENSE16), "second": teacher(TOP2_PACKED)}
    views = {"num_views": num_views, "seed": 3, "augmentations": FLIP_AND_CROP}
    teachers = {name: entries[name] for name in names}
    plan = recipe(path, teachers=teachers, views=views, shard_rows=40, batch_size=20, **RECORDED)
    modules = {name: TEACHERS[name] for name in names}
    return precompute(plan, teachers=modules, dataset=Pixels(90)).shards_written


def begin(path: Path) -> int:
    """Precompute what is to grow: one view by one teacher, three shards."""
    return run(path, 1, ["first"])


def state(path: Path) -> int:
    """Open the cache as a student would; returns its views, and ten for each teacher."""
    cache = open_cache(path)
    cache.rows([ViewKey(cache.num_views - 1, 89)])
    return cache.num_views + 10 * len(cache.manifest.teachers)


def dying(is_time: Callable[[], bool], action: Callable[[], int]) -> int:
    """SIGKILL this process before the first call that changes a directory or the disk for which it is time."""

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if is_time():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, name, call)

    for name in ("replace", "fsync", "mkdir", "open", "unlink"):
        watched(name)
    return action()


def counting(limit: int | None, report: Path | None, action: Callable[[], int]) -> int:
    """Count the calls that change a directory or the disk; die after so many."""
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return limit is not None and calls > limit

    status = dying(count, action)
    if report:
        report.write_text(str(calls))
    return status


def killed_at_time(path: Path, seconds: float) -> None:
    child = forked(lambda: run(path))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    ended(child)


def killed_at_call(path: Path, point: int) -> None:
    assert ended(forked(lambda: counting(point, None, lambda: run(path)))) in (-signal.SIGKILL, *range(NUM_SHARDS + 1))


def killed_at_shard(path: Path, number: int) -> None:
    """Kill a run at its next call after so many shards are committed."""
    assert ended(forked(lambda: dying(lambda: len(whole_shards(path)) >= number, lambda: run(path)))) == -signal.SIGKILL


def whole_shards(path: Path) -> set[str]:
    """Return the shards of which everything is committed, each by the beginning of its files' names."""
    groups = [*(f"{teacher}.logits" for teacher in TEACHERS), "views"]
    return set.intersection(*({p.name[:5] for p in path.glob(f"{group}.commits/c.*.0.0")} for group in groups))


def committed(path: Path) -> list[str]:
    """List the files of the shards of which everything is committed."""
    shards = whole_shards(path)
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


def growths(root: Path, count: int) -> list[dict[str, Any]]:
    """Kill runs that add a view and a teacher to a finished cache; it opens at any time."""
    assert ended(forked(lambda: begin(root / "begun"))) == 3
    shutil.copytree(root / "begun", root / "grown")
    assert ended(forked(lambda: counting(None, root / "calls", lambda: run(root / "grown")))) == 6
    calls, expected = int((root / "calls").read_text()), contents(root / "grown")
    found = []
    for number in range(count):
        path = root / f"grows{number}" / "c.zarr"
        shutil.copytree(root / "begun", path)
        # All over its life, and half of them around the step that makes it the grown one.
        point = calls - number if number % 2 else calls * number // count
        child = forked(lambda point=point, path=path: counting(point, None, lambda: run(path)))  # type: ignore[misc]
        assert ended(child) in (-signal.SIGKILL, *range(7))
        opened = ended(forked(lambda path=path: state(path)))  # type: ignore[misc]
        found.append(outcome("growth", path, expected) | {"opened": opened})
    return found


def main(root: Path, times: int = 1) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    num_points, num_kills = times * NUM_POINTS, times * (NUM_POINTS + NUM_TIMES)
    generator = random.Random(7)
    assert ended(forked(lambda: counting(None, root / "calls", lambda: run(root / "whole")))) == 6
    started = time.perf_counter()
    assert ended(forked(lambda: run(root / "again"))) == 6
    seconds = time.perf_counter() - started
    calls = int((root / "calls").read_text())
    expected = contents(root / "whole")
    found = []
    for number in range(num_kills):
        path = root / str(number) / "c.zarr"
        path.parent.mkdir()
        # The second kill hits the run that continues.
        for _ in range(1 + number % 2):
            if number >= num_points:
                killed_at_time(path, generator.uniform(0, seconds))
            elif number % 2 or number == 0:
                # Spread over the whole life; a run that continues makes fewer calls.
                point = generator.randrange(calls * number // num_points, calls * (number + 1) // num_points)
                killed_at_call(path, point)
            else:
                # Most calls may come after the last commit: how many come before depends on the threads.
                killed_at_shard(path, NUM_SHARDS * number // num_points)
        found.append(outcome("point" if number < num_points else "time", path, expected))
        shutil.rmtree(path.parent)
    return found + growths(root, times * NUM_GROWN)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
