"""Kill a growth in images at random moments, while students read: a program run apart, as `killing` is.

    python -m tests.stage_one.killing_images DIRECTORY [KILLS]

A reader opens the cache again and again, another keeps the one that it opened first. Prints a JSON list with what was
found after each resume.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from logitcache.cache.cache import open_cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from tests.cache.made import contents, stamps
from tests.stage_one.apart import ended, forked
from tests.stage_one.killing import counting
from tests.stage_one.test_new_images import FIRST, NEW, add, equal, grow, rows_of

NUM_KILLS = 12
NUM_SHARDS = 2
"""The last shard of each view, which becomes longer."""


def run(root: Path) -> int:
    """Append the new images; return how many shards were written."""
    return grow(root / "c.zarr", root / "images", "tu").shards_written


def read(root: Path, expected: list[Any]) -> int:
    """Read as students do until a file is there; return 1 if the cache was seen as it was, 2 as it is to be, 3 both."""
    kept, seen = open_cache(root / "c.zarr"), {90: 0, 120: 0}
    while not (root / "stop").exists():
        found = open_cache(root / "c.zarr")
        seen[len(found)] = 1
        for cache in (found, kept):
            assert equal(rows_of(cache, 90), expected), "other rows of the first images"
        assert len(found.labels) == len(found)
        time.sleep(0.1)
    return seen[90] + 2 * seen[120]


def outcome(root: Path, point: int, times: int, expected: list[Any], whole: dict[str, bytes]) -> dict[str, Any]:
    """Kill a growth, `times` times, while another process reads; let it end, and describe what is there."""
    reader = forked(lambda: read(root, expected))
    for _ in range(times):
        assert ended(forked(lambda: counting(point, None, lambda: run(root)))) in (-signal.SIGKILL, *range(5))
    opened = len(open_cache(root / "c.zarr"))
    problems = [one for one in verify_cache(open_snapshot(root / "c.zarr")).problems if ".errors" not in one]
    first = {name: stamp for name, stamp in stamps(root / "c.zarr").items() if "/c." in name and name in kept_of(root)}
    written = ended(forked(lambda: run(root)))
    after = stamps(root / "c.zarr")
    (root / "stop").touch()
    return {
        "opened": opened,
        "problems": problems,
        "written": written,
        "reader": ended(reader),
        "identical": contents(root / "c.zarr") == whole,
        "kept": all(after[name] == stamp for name, stamp in first.items()),
        "beside": sorted(os.listdir(root / "c.zarr")) == sorted({name.split("/")[0] for name in whole}),
    }


def kept_of(root: Path) -> set[str]:
    """Name the files of the shards that the growth leaves as they are."""
    return {name for name in contents(root / "c.zarr") if "/c." in name and name.split("/c.")[1][2] in "01"}


def main(root: Path, count: int = NUM_KILLS) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(root / "home")
    base = root / "base"
    assert ended(forked(lambda: grow(base / "c.zarr", add(base / "images", FIRST), "tu").shards_left)) == 0
    shutil.copytree(base, root / "whole")
    grown_folder(root / "whole")
    assert ended(forked(lambda: counting(None, root / "calls", lambda: run(root / "whole")))) == NUM_SHARDS
    calls, whole = int((root / "calls").read_text()), contents(root / "whole/c.zarr")
    expected, generator, found = rows_of(open_cache(base / "c.zarr"), 90), random.Random(7), []
    for number in range(count):
        path = Path(shutil.copytree(base, root / str(number)))
        # All over its life, and half of them around the steps that make it the grown one.
        last = generator.randrange(calls // 2, calls + 1)
        point = last if number % 2 else generator.randrange(calls * number // count, calls * (number + 1) // count)
        found.append(outcome(grown_folder(path), point, 1 + number % 3 // 2, expected, whole))
        shutil.rmtree(path)
    return found


def grown_folder(root: Path) -> Path:
    add(root / "images", NEW)
    return root


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
