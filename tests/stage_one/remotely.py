"""Runs on caches in storage, killed, or side by side: a program that is run apart, since it forks and must have no
threads.

    python -m tests.stage_one.remotely DIRECTORY

The variable LOGITCACHE_TEST_URL names an empty place. Prints what was found, as JSON, by scenario; what was written is
for the caller to compare.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import s3fs  # type: ignore[import-untyped]  # noqa: F401  # once, for all forks
import torch

from logitcache.cache.cache import open_cache
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.mirrors_folder import FOLDER
from logitcache.store.remote import client
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE16, TOP2_PACKED, Linear, Pixels, raw, recipe, teacher
from tests.front import SHORT
from tests.stage_one.apart import ended, forked

URL = "LOGITCACHE_TEST_URL"
NUM_IMAGES, NUM_SHARDS, NUM_KILLS = 90, 6, 4
TEACHERS = {"first": Linear(16), "second": Linear(7, seed=1)}


def plan(cache: Any) -> PrecomputeRecipe:
    """Return a recipe of two teachers, one hot and one packed: six shards."""
    entries = {"first": teacher(DENSE16), "second": teacher(TOP2_PACKED)}
    return recipe(cache, teachers=entries, shard_rows=40, batch_size=20)


def run(cache: str) -> int:
    """Precompute; returns how many shards were written."""
    return precompute(plan(cache), teachers=TEACHERS, dataset=Pixels(NUM_IMAGES)).shards_written


def dying(limit: int | None, report: Path | None, action: Callable[[], int]) -> int:
    """Count the requests that write; SIGKILL this process at one of them: before it, or after it."""
    calls, write = 0, client.Remote.write

    def counted(self: client.Remote, *arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if limit is not None and calls > limit and limit % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments, **options)
        if limit is not None and calls > limit:
            os.kill(os.getpid(), signal.SIGKILL)

    client.Remote.write = counted  # type: ignore[method-assign]
    status = action()
    if report:
        report.write_text(str(calls))
    return status


def kills(root: Path, url: str) -> list[dict[str, int]]:
    """Kill runs all over their life and continue them, half of them as another machine would, which has no copy."""
    assert ended(forked(lambda: dying(None, root / "calls", lambda: run(f"{url}/whole.zarr")))) == NUM_SHARDS
    calls, found = int((root / "calls").read_text()), []
    for number in range(NUM_KILLS):
        cache = f"{url}/kill{number}.zarr"
        point = calls * (4 * number + 3) // (4 * NUM_KILLS)  # apart by more than the threads have under way
        killed = ended(forked(lambda point=point, cache=cache: dying(point, None, lambda: run(cache))))  # type: ignore[misc]
        if number % 2:
            os.environ[FOLDER] = str(root / f"other{number}")
        found.append({"killed": killed, "point": point, "written": ended(forked(lambda cache=cache: run(cache)))})  # type: ignore[misc]
    return found


def read(cache: str, report: Path) -> int:
    """Read all rows of a cache."""
    opened, digest = open_cache(cache), hashlib.sha256()
    for view in range(opened.num_views):
        rows = opened.rows([ViewKey(view, index) for index in range(len(opened))])
        for name in sorted(rows):
            for values in raw(rows[name].compact):
                digest.update(values.tobytes())
    report.write_text(digest.hexdigest())
    return 0


def sides(root: Path, url: str) -> list[str]:
    """Let two processes read the same cache at a time, which nobody here has read; returns what they read."""
    os.environ[FOLDER] = str(root / "shared")
    reports = [root / "first", root / "second"]
    children = [forked(lambda report=report: read(f"{url}/whole.zarr", report)) for report in reports]  # type: ignore[misc]
    assert [ended(child) for child in children] == [0, 0]
    local = root / "local.zarr"
    assert ended(forked(lambda: run(str(local)))) == NUM_SHARDS
    assert ended(forked(lambda: read(str(local), root / "third"))) == 0
    return [file.read_text() for file in (*reports, root / "third")]


def main(root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    for name, value in SHORT.items():
        setattr(client, name, value)
    os.environ[FOLDER] = str(root / "copies")
    return {"kills": kills(root, os.environ[URL]), "read": sides(root, os.environ[URL])}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
