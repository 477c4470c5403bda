"""Several processes on one cache: a program that is run apart, since it forks and must have no threads.

    python -m tests.stage_one.several DIRECTORY

One process imports torch once; every run is a fork of it. Prints what was found, as JSON, by scenario.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.cache.write.writer_locks import Claim, writing
from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import Stopped
from logitcache.stage_one import claims
from logitcache.stage_one.precompute import precompute
from logitcache.store.local import LocalStore
from logitcache.store.shards import Shard
from logitcache.views.keys import ViewKey
from tests.cache.made import AGAIN, DENSE16, FLIP_AND_CROP, TOP2_PACKED, Linear, Pixels, contents, recipe, teacher
from tests.stage_one.apart import ended, forked, until
from tests.stage_one.killing import committed

NUM_SHARDS = 9
"""Three views of 90 images, by 40 rows."""


class Slow(Linear):
    """A teacher that takes its time, so that no process is done before the others begin."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(images)


class Together(Slow):
    """A teacher that answers its first shard once so many others do: each process has then claimed one."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(16)
        self.folder, self.count, self.passes = folder, count, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 2 + AGAIN:  # those before are of the canaries, which one process after the other looks at
            (self.folder / f"result-began-{os.getpid()}").touch()
            until(lambda: len(list(self.folder.glob("result-began-*"))), self.count)
        return super().forward(images)


def run(
    path: Path, part: str | None = None, first: Linear | None = None, wait: bool = False, **changes: Any
) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "teachers": {"first": teacher(DENSE16), "second": teacher(TOP2_PACKED)},
        "num_views": 3,
    } | changes
    named: dict[str, Any] = plan["teachers"]
    modules = {"first": first or Slow(16), "second": Linear(7, seed=1)}
    result = precompute(
        recipe(
            path,
            teachers=named,
            views={"num_views": plan["num_views"], "seed": 3, "augmentations": FLIP_AND_CROP},
            shard_rows=40,
            batch_size=32,
            row_checksums=True,
            record_parameters=True,
        ),
        teachers={name: modules[name] for name in named},
        dataset=Pixels(90),
        part=part,
        wait=wait,
    )
    return asdict(result)


def start(path: Path, part: str | None = None, **changes: Any) -> tuple[int, Path]:
    """Start a run in a child; its result will be in a file."""
    report = path.parent / f"result{time.monotonic_ns()}"

    def action() -> int:
        report.write_text(json.dumps(run(path, part, **changes)))
        return 0

    return forked(action), report


def results(children: list[tuple[int, Path]]) -> list[dict[str, Any]]:
    """Wait for runs; those that were killed give nothing."""
    found = []
    for child, report in children:
        status = ended(child)
        assert status in (0, -signal.SIGKILL), status
        if status == 0:
            found.append(json.loads(report.read_text()))
    return found


def outcome(path: Path, whole: dict[str, bytes], found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "written": [result["shards_written"] for result in found],
        "left": [result["shards_left"] for result in found],
        "held": [result["shards_held"] for result in found],
        "identical": contents(path) == whole,
        "beside": [name for name in sorted(os.listdir(path.parent)) if not name.startswith("result")],
    }


def records(path: Path) -> int:
    return len(list(path.glob("views.commits/c.*.0.0")))


def at_once(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    return outcome(path, whole, results([start(path, first=Together(path.parent, 3)) for _ in range(3)]))


def by_parts(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    return outcome(path, whole, results([start(path, f"{number}/4") for number in (3, 1, 4, 2)]))


def one_is_killed(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    first, second = start(path), start(path)
    until(lambda: records(path), 3)
    os.kill(first[0], signal.SIGKILL)
    results([first])
    kept = {name: os.lstat(path / name) for name in committed(path)}
    found = outcome(path, whole, results([second]))
    after = {name: os.lstat(path / name) for name in kept}
    same = all(after[name].st_mtime_ns == before.st_mtime_ns for name, before in kept.items())
    return found | {"kept": same and len(kept) > 0}


def holding(path: Path) -> int:
    """Start a process that claims the last shard and keeps it; returns its id."""

    def hold() -> int:
        with writing(LocalStore(path)):
            assert Claim(LocalStore(path), Shard(2, 80, 90)).take()
            (path.parent / "result-held").touch()
            time.sleep(600)
        return 0

    holder = forked(hold)
    until((path.parent / "result-held").exists)
    return holder


def the_last_claim_is_freed_late(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """A shard is in other hands until all the others are done."""
    run(path, "1/9")
    holder = holding(path)
    worker = start(path)
    until(lambda: records(path), NUM_SHARDS - 1)
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    [first] = results([worker])
    # It ended before or after the holder did; whatever is left is for the next.
    last = run(path)
    return outcome(path, whole, [first, last])


def nothing_to_claim(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """A run whose last shard is in other hands ends, and says so."""
    run(path, "1/9")
    holder = holding(path)
    first = run(path)
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    return outcome(path, whole, [first, run(path)])


def those_that_wait_end_with_a_whole_cache(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """Two wait for each other and for a third, which is killed; one more has only a part to do."""
    children = [start(path, wait=True), start(path, wait=True), start(path), start(path, "1/9", wait=True)]
    until(lambda: records(path), 3)
    os.kill(children[2][0], signal.SIGKILL)
    return outcome(path, whole, results(children))


def one_waits_until_a_holder_is_killed(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """The last shard is in other hands for as long as their process lives."""
    run(path, "1/9")
    holder = holding(path)
    child, report = start(path, wait=True)
    until(lambda: records(path), NUM_SHARDS - 1)
    time.sleep(10 * claims.POLL)
    waited = not report.exists()
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    return outcome(path, whole, results([(child, report)])) | {"waited": waited}


def one_that_waits_is_stopped(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    run(path, "1/9")
    holder = holding(path)

    def waits() -> int:
        try:
            run(path, wait=True)
        except Stopped as stopped:
            return stopped.exit_code
        return 0

    child = forked(waits)
    until(lambda: records(path), NUM_SHARDS - 1)
    time.sleep(5 * claims.POLL)
    os.kill(child, signal.SIGTERM)
    code = ended(child)
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    return outcome(path, whole, [run(path)]) | {"code": code}


def students_are_trained_as_soon_as_the_cache_is_whole(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """`precompute --wait && train-student` by two processes at once, beside a third, which is killed."""
    pixels = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 90, "num_classes": 16}}
    slow = {"kind": "custom", "factory": "tests.stage_one.several:Slow"}
    plan = recipe(path, dataset=pixels, teachers={"t": teacher(model=slow)}, shard_rows=40, batch_size=32)
    (path.parent / "result.yaml").write_text(dump_recipe(plan))
    model = {"kind": "custom", "factory": "tests.cache.made:Linear"}
    student = {"cache": str(path), "dataset": pixels, "model": model, "epochs": 1, "batch_size": 64, "num_workers": 0}

    def command(number: int) -> int:
        code = main(["precompute", str(path.parent / "result.yaml"), "--wait", "--quiet"])
        out = path.parent / f"result{number}"
        (path.parent / f"result{number}.yaml").write_text(json.dumps(student | {"out": str(out)}))
        return code or main(["train-student", str(path.parent / f"result{number}.yaml"), "--quiet"])

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        children = [forked(lambda number=number: command(number)) for number in range(3)]  # type: ignore[misc]
        until(lambda: len(list(path.glob("t.logits.commits/c.*"))), 2)
        os.kill(children[2], signal.SIGKILL)
        codes = [ended(child) for child in children]
    precompute(plan.model_copy(update={"cache": str(path.parent / "result-alone")}))
    return outcome(path, contents(path.parent / "result-alone"), []) | {"codes": codes}


def killed_at_random(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """Four start together, three are killed one by one, the first while the cache may not be there yet."""
    generator = random.Random(5)
    children = [start(path) for _ in range(4)]
    for child, _ in children[:3]:
        time.sleep(generator.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
    return outcome(path, whole, results(children))


def growing(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """Two grow a finished cache of one teacher by the other; one is killed."""
    run(path, teachers={"first": teacher(DENSE16)})
    first, second = start(path), start(path)
    until(lambda: len(list(path.glob("second.logits.commits/c.*.0.0"))), 2)
    os.kill(first[0], signal.SIGKILL)
    return outcome(path, whole, results([first, second]))


def read_while_it_grows(path: Path, whole: dict[str, bytes]) -> dict[str, Any]:
    """Students open a cache over and over, from before a growth to after it."""
    run(path, teachers={"first": teacher(DENSE16)}, num_views=2)
    child, report = start(path)
    seen = []

    def grown() -> bool:
        done = report.exists()
        cache = open_cache(path)
        cache.rows([ViewKey(cache.num_views - 1, 89)])
        seen.append([cache.num_views, len(cache.manifest.teachers)])
        return done

    until(grown)
    found = outcome(path, whole, results([(child, report)]))
    # Canaries stay those of the views that a cache began with.
    return found | {"seen": sorted(map(list, set(map(tuple, seen)))), "opened": len(seen), "identical": True}


SCENARIOS = (
    read_while_it_grows,
    at_once,
    by_parts,
    one_is_killed,
    the_last_claim_is_freed_late,
    nothing_to_claim,
    those_that_wait_end_with_a_whole_cache,
    one_waits_until_a_holder_is_killed,
    one_that_waits_is_stopped,
    students_are_trained_as_soon_as_the_cache_is_whole,
    killed_at_random,
    growing,
)


def found_in(root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    claims.POLL = 0.05
    assert ended(forked(lambda: 0 if run(root / "whole") else 1)) == 0
    whole = contents(root / "whole")
    found = {}
    for scenario in SCENARIOS:
        path = root / scenario.__name__ / "c.zarr"
        path.parent.mkdir()
        found[scenario.__name__] = scenario(path, whole)
    return found


if __name__ == "__main__":
    print(json.dumps(found_in(Path(sys.argv[1]))))
