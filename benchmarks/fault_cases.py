"""The cases of `faults.py`: each does something to caches in a folder, and returns what is `wrong`, with counts.

A case runs in a fork of a process that has imported all that it needs, and that has no threads.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import distributed  # noqa: F401  # which commands import only if they need it, in each fork
import torch
from fault_kills import Kills, numbers
from torch import nn

from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from tests.stage_one import full_disk as small_disk
from tests.stage_one import killing_images as appending
from tests.stage_one import misbehaving
from tests.stage_one import several as sharing
from tests.stage_one import starting as dying
from tests.stage_one.apart import REPOSITORY, by_two
from tests.views import small_shared_memory

HANGS = 36_000
"""Seconds after which a case counts as hanging, however slow the machine is; what it runs has closer bounds."""

PIPED = ("64k", "160k")
"""Sizes of shared memory that hold the workers' locks, and no images: these come through a pipe."""


class State(Protocol):
    """What was found before."""

    def once(self, key: str, action: Callable[[], Any]) -> Any:
        """Return what an action found, now or in an earlier run."""


def unshared(module: ModuleType, *arguments: str) -> Any:
    """Run a program of the tests with mounts of its own, and return its JSON; None if this machine cannot run it."""
    command = ["unshare", "-Urm", sys.executable, "-m", module.__name__, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=HANGS)
    if done.returncode == 77 or (done.returncode and "unshare" in done.stderr):
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def kills(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Kill every command that writes, once or twice, and run it again; two processes do so at a time."""
    commands, count = Kills(folder), 100 if quick else 1000
    found = by_two(numbers(count), lambda number: state.once(f"kill {number}", lambda: commands.wrong(number)), HANGS)
    wrong = [text for texts in found for text in texts]
    return {"kills": count, "wrong": len(wrong), "cases": wrong}


def starting(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Kill workers of a cluster of this machine while they start."""
    count, workers = (1, 1) if quick else (12, 2)
    found = dying.main(folder, count, workers)
    return {"kills": found["killed"], "wrong": int(found["killed"] < count) + int(not found["identical"])}


def new_images(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Kill runs that append images to a cache while students read it, and let them continue."""
    found = appending.main(folder, appending.NUM_KILLS if quick else 100)
    good = [one["identical"] and one["kept"] and one["beside"] and one["reader"] in (1, 2, 3) for one in found]
    wrong = [one for one, is_good in zip(found, good, strict=True) if one["problems"] or not is_good]
    return {"kills": len(found), "finished": sum(one["opened"] == 120 for one in found), "wrong": len(wrong)}


def several(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Let several processes write one cache, of which some are killed and some wait for others."""
    found = sharing.found_in(folder)
    return {"scenarios": len(found), "wrong": sum(not one["identical"] for one in found.values())}


def full_disk(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Fill a disk, and continue with more room."""
    found = unshared(small_disk, str(folder))
    if found is None:
        return {"skipped": "no tmpfs can be mounted here", "wrong": 0}
    good = found["sound"] and found["identical"] and found["written"] == found["shards"] - found["committed"]
    return {"committed": found["committed"], "wrong": int(not good)}


def full_memory(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Render by processes whose shared memory holds no image: the same images, or an error within seconds."""
    found = unshared(small_shared_memory)
    if found is None:
        return {"skipped": "no tmpfs can be mounted here", "wrong": 0}
    lost = [size for size, one in found.items() if not one["identical"] and (size in PIPED or not one["error"])]
    return {"sizes": list(found), "wrong": len(lost) + sum(one["seconds"] > 60 for one in found.values())}


def storage(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Write and read caches in S3 that loses answers, cuts, shortens and empties bodies, redirects and drips."""
    names, count = (misbehaving.FEW, 1) if quick else ([*misbehaving.CASES], 20)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        (folder / name).mkdir()
        found |= state.once(f"storage {name}", lambda name=name: misbehaving.main(folder / name, count, [name]))  # type: ignore[misc]
    wrong = {name: one["wrong"] for name, one in found.items() if one["wrong"]}
    return {
        "rounds": sum(one["rounds"] for one in found.values()),
        "faults": sum(one["faults"] for one in found.values()),
        "slowest_command": max(one["slowest"] for one in found.values()),
        "wrong": sum(wrong.values()),
        "cases": wrong,
    }


def damage(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Flip a bit of a file, or cut it short, and see whether `verify` tells."""
    cache = _cache(folder / "c.zarr")
    files = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    generator, names, missed = random.Random(1), list(files), []
    count = 100 if quick else 1000
    for number in range(count):
        # Each file in turn: most bytes lie in few of them.
        file = names[number % len(names)]
        data = bytearray(files[file])
        place = generator.randrange(len(data))
        if generator.random() < 0.3:
            del data[place:]
        else:
            data[place] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        if not _noticed(cache) and not _same_words(file, files[file]):
            missed.append(f"{file.name} at {place}")
        file.write_bytes(files[file])
    assert not _noticed(cache)
    return {"damages": count, "wrong": len(missed), "missed": missed}


def _noticed(cache: Path) -> bool:
    try:
        return bool(verify_cache(open_snapshot(cache)).problems)
    except CacheError:
        return True


def _same_words(file: Path, data: bytes) -> bool:
    """Whether metadata says the same in other white space."""
    try:
        return file.name == "zarr.json" and json.loads(file.read_bytes()) == json.loads(data)
    except ValueError:
        return False


def _cache(path: Path) -> Path:
    torch.manual_seed(0)
    plain = {"mean": [0.5], "std": [0.5]}
    modules = {
        "dense": nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        "top": nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    }
    recipe = {
        "cache": str(path),
        "dataset": {"kind": "bundled", "split": "test", "num_images": 500},
        "views": {"num_views": 2, "augmentations": [{"kind": "random_crop", "size": 28, "padding": 2}]},
        "teachers": {
            "dense": {"preprocessing": plain},
            "top": {"preprocessing": plain, "logits": {"kind": "top_k", "k": 3, "storage": "packed"}},
        },
        "num_workers": 0,
        "shard_rows": 2048,
        "row_checksums": True,
        "record_parameters": True,
        "device": "cpu",
    }
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers=modules)
    return path


Case = Callable[[Path, bool, State], dict[str, Any]]
CASES: tuple[Case, ...] = (
    kills,  # first, as it forks: this process must have no threads
    starting,
    several,
    full_disk,
    full_memory,
    storage,
    damage,
    new_images,
)
