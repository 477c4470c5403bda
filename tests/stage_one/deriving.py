"""Deriving that is killed, and shared by workers: a program that is run apart, since it forks and must have no threads.

    python -m tests.stage_one.deriving DIRECTORY

Prints what was found, as JSON.
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from logitcache.cache import cache
from logitcache.errors import LogitCacheError
from logitcache.report.summary import summarize
from logitcache.stage_one.cluster.cluster import HERE, Cluster
from logitcache.stage_one.derive.derive import DeriveRecipe, derive
from tests.cache.made import contents, flip
from tests.stage_one.apart import ended, forked, until
from tests.stage_one.clustered import MARKS, cluster
from tests.stage_one.derived import derivation, source
from tests.stage_one.killing import counting

NUM_KILLS, NUM_SHARDS = 8, 10
TRANSFORM = {"kind": "transform", "step": 0.2, "corrections": 4}
PACKED32 = {"kind": "dense", "dtype": "float32", "storage": "packed"}
MADE = {
    "a": {"logits": TRANSFORM},
    "both": {"members": {"a": 1, "b": 1}, "average": "probabilities", "temperature": 2.0, "logits": PACKED32},
}


def plan(root: Path, out: Path) -> DeriveRecipe:
    return derivation(root / "source", out, MADE, shard_rows=64)


def killed(root: Path, expected: dict[str, bytes]) -> list[dict[str, Any]]:
    """Kill runs all over their life; every second one again when it continues."""
    assert ended(forked(lambda: counting(None, root / "calls", lambda: _derived(root, root / "again")))) == NUM_SHARDS
    calls = int((root / "calls").read_text())
    found = []
    for number in range(NUM_KILLS):
        out = root / f"killed{number}" / "c.zarr"
        out.parent.mkdir()
        for _ in range(1 + number % 2):
            point = calls * number // NUM_KILLS + 3
            child = forked(lambda point=point, out=out: counting(point, None, lambda: _derived(root, out)))  # type: ignore[misc]
            assert ended(child) in (-signal.SIGKILL, *range(NUM_SHARDS + 1))
        begun = len(list(out.glob("both.logits.commits/c.*")))
        written = ended(forked(lambda out=out: _derived(root, out)))  # type: ignore[misc]
        beside = sorted(os.listdir(out.parent))
        found.append({"begun": begun, "written": written, "beside": beside, "identical": contents(out) == expected})
        shutil.rmtree(out.parent)
    return found


def _derived(root: Path, out: Path) -> int:
    return derive(plan(root, out)).shards_written


def shared(root: Path, expected: dict[str, bytes]) -> list[dict[str, Any]]:
    """Let one worker, then two of which one is killed, derive on a scheduler."""
    found = []
    for workers in (1, 2):
        out = root / f"workers{workers}"
        with cluster(workers) as running:
            client = forked(lambda out=out, at=running.address: _on_cluster(root, out, at))  # type: ignore[misc]
            if workers == 2:
                until(lambda out=out: len(list(out.glob("both.logits.commits/c.*"))), 2)  # type: ignore[misc]
                running.kill(running.workers[0])
            found.append({"left": ended(client), "identical": contents(out) == expected})
    return found


def _on_cluster(root: Path, out: Path, address: str) -> int:
    return derive(plan(root, out), scheduler=address).shards_left


def parts(root: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Derive by two parts at once, and once more for nothing."""
    out = root / "parts"
    children = [forked(lambda part=part: derive(plan(root, out), part=part).shards_written) for part in ("1/2", "2/2")]  # type: ignore[misc]
    return {"written": [*map(ended, children)], "identical": contents(out) == expected}


def summaries(root: Path) -> dict[str, Any]:
    """Summarize here and on two workers, a sound cache and a damaged one."""
    with cluster(2) as running:
        for name, at in (("here", HERE), ("there", Cluster(scheduler=running.address))):
            assert ended(forked(lambda name=name, at=at: _summary(root, name, at))) == 0  # type: ignore[misc]
        shutil.copytree(root / "source", root / "damaged")
        flip(root / "damaged" / "b.logits" / "c.1.1.0", 9)
        at = Cluster(scheduler=running.address)
        cache.FILES_COMPARED = 0  # as of a cache that is too large to be compared when it is opened
        assert ended(forked(lambda: _summary(root, "damaged", at, "damaged"))) == 3
    return {name: (root / f"{name}.json").read_text() for name in ("here", "there", "damaged")}


def _summary(root: Path, name: str, where: Cluster, cache: str = "source") -> int:
    try:
        found = json.dumps(asdict(summarize(root / cache, None, where)))
    except LogitCacheError as error:
        (root / f"{name}.json").write_text(str(error))
        return error.exit_code
    (root / f"{name}.json").write_text(found)
    return 0


def main(root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    (root / "marks").mkdir()
    os.environ[MARKS] = str(root / "marks")
    assert ended(forked(lambda: 0 if source(root / "source") else 1)) == 0
    assert ended(forked(lambda: _derived(root, root / "whole"))) == NUM_SHARDS
    expected = contents(root / "whole")
    return {
        "killed": killed(root, expected),
        "shared": shared(root, expected),
        "parts": parts(root, expected),
        "summaries": summaries(root),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
