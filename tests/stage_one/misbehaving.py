"""Caches in storage that misbehaves: a program that writes, continues and reads them while requests fail.

    python -m tests.stage_one.misbehaving DIRECTORY ROUNDS [FAULT ...]

Prints by case, as JSON, how many rounds left another cache than storage without faults, lost or returned other rows,
reached another server, or took longer than SECONDS; how many requests failed, and how long the slowest command took.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.errors import LogitCacheError
from logitcache.report.verify_and_repair import verify
from logitcache.runtime.console import configure
from logitcache.stage_one.precompute import precompute
from logitcache.store.mirrors_folder import FOLDER
from logitcache.store.remote.transfer import VARIABLE
from logitcache.views.keys import ViewKey
from tests.cache.made import contents, raw
from tests.front import Front, Request
from tests.objects import Bucket, bucket, folder
from tests.stage_one.remotely import NUM_IMAGES, TEACHERS, Pixels, plan

SECONDS = 30
"""Within which a command ends whatever the storage does: its requests of a second, three seconds with retries."""

COMMANDS = 12
"""Runs that a cache may take while requests fail; the last one is without faults."""


def _any(request: Request) -> bool:
    return True


def _lists(request: Request) -> bool:
    return "list-type" in request.target


def _of_shards(request: Request) -> bool:
    return "/c." in request.target


def _method(name: str) -> Callable[[Request], bool]:
    return lambda request: request.method == name and not _lists(request)


class Case(NamedTuple):
    """Which fault happens to which requests, and to what part of them."""

    fault: str
    picked: Callable[[Request], bool]
    fraction: float


CASES = {
    "lost answers": Case("cut", _method("PUT"), 0.3),
    "cut bodies": Case("cut", _method("GET"), 0.3),
    "short bodies": Case("short", _of_shards, 0.1),
    "redirects": Case("307", _any, 0.05),
    "empty bodies": Case("empty", _of_shards, 0.1),
    "short metadata": Case("short", _method("GET"), 0.1),
    "stale lists": Case("stale", _lists, 0.5),
    "failed conditions": Case("412", _method("PUT"), 0.1),
    "moved for good": Case("301", _any, 0.05),
    "drips": Case("drip", _any, 0.02),
    "endless bodies": Case("endless error", _any, 0.02),
}

FEW = [*CASES][::3]
"""Those of quick checks."""


def rounds(root: Path, store: Bucket, count: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Let each of the named faults happen in so many rounds."""
    local = root / "local.zarr"
    precompute(plan(local), teachers=TEACHERS, dataset=Pixels(NUM_IMAGES))
    found = {}
    for name in names:
        case, other = CASES[name], Front(folder(root))
        store.front.location = lambda request, other=other: f"{other.url}{request.target}"  # type: ignore[misc]
        store.front.seen.clear()
        wrong, slowest = 0, 0.0
        for seed in range(count):
            sound, seconds = _round(root / f"{name}{seed}", store, f"{name.replace(' ', '-')}{seed}", case, seed, local)
            wrong, slowest = wrong + (not sound or seconds > SECONDS), max(slowest, seconds)
        store.front.fail(0)
        faults = len(store.front.asked(failed=True))
        wrong += len(other.seen) + (faults == 0)
        found[name] = {"rounds": count, "faults": faults, "wrong": wrong, "slowest": round(slowest, 1)}
        other.close()
    return found


def _round(root: Path, store: Bucket, name: str, case: Case, seed: int, local: Path) -> tuple[bool, float]:
    """Write a cache, read it on another machine, and compare both; returns the seconds of the slowest command."""
    os.environ[FOLDER] = str(root / "writer")
    url, slowest = f"{store.url}/{name}.zarr", 0.0
    for number in range(COMMANDS):
        faults = number < COMMANDS - 1
        store.front.fail(case.fraction * faults, case.fault, seed=seed * COMMANDS + number, picked=case.picked)
        done, seconds = _timed(lambda: precompute(plan(url), teachers=TEACHERS, dataset=Pixels(NUM_IMAGES)).shards_left)
        slowest = max(slowest, seconds)
        if done == 0:
            break
    os.environ[FOLDER] = str(root / "reader")
    expected = _rows(str(local))
    store.front.fail(case.fraction, case.fault, seed=seed, picked=case.picked)
    read, seconds = _timed(lambda: _rows(url))
    same = read is None or all(map(np.array_equal, read, expected))
    store.front.fail(0)
    sound = done == 0 and store.contents(f"{name}.zarr") == contents(local) and not verify(url).problems
    return sound and same, max(slowest, seconds)


def _timed(command: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a command returns, None if it refuses, and how long it took."""
    began = time.monotonic()
    try:
        found = command()
    except LogitCacheError:
        found = None
    return found, time.monotonic() - began


def _rows(location: str) -> list[np.ndarray[Any, Any]]:
    cache = open_cache(location)
    answers = cache.rows([ViewKey(view, index) for view in range(cache.num_views) for index in range(len(cache))])
    return [np.asarray(values) for name in sorted(answers) for values in raw(answers[name].compact)]


def main(root: Path, count: int, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch, bucket() as store:
        patch.setenv(VARIABLE, "1")
        patch.setenv(FOLDER, str(root))  # changed below
        return rounds(root, store, count, names or [*CASES])


if __name__ == "__main__":
    torch.set_num_threads(1)
    configure(quiet=True)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
