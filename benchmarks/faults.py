"""Does a cache survive what happens to computers?

    python benchmarks/faults.py [--quick] [--json]

Kills precompute at more than 200 moments of its life, creating, continuing and growing caches; flips bits of, or
truncates, 1,000 files of a cache; fills a small disk; lets several processes write one cache while some are killed;
writes and reads caches in storage that loses, cuts and delays answers.
Run from a checkout, whose tests have the programs that do this. Exits 1 where anything committed is lost, anything bad
is accepted, or the bytes differ from those of an undisturbed run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.console import configure
from logitcache.errors import CacheError
from logitcache.recipe import load_recipe
from logitcache.teacher.precompute import PrecomputeRecipe, precompute
from logitcache.versions import versions

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS = 20
"""Caches that one round of the program that kills looks at, each after a kill or two."""


def program(name: str, *arguments: str, before: tuple[str, ...] = ()) -> Any:
    """Run a program of the tests, which prints JSON; None where this machine cannot run it."""
    command = [*before, sys.executable, "-m", f"tests.teacher.{name}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 77 or (before and done.returncode and "unshare" in done.stderr):
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def kills(folder: Path, quick: bool) -> dict[str, Any]:
    rounds = 1 if quick else 11
    found = program("killing", str(folder), str(rounds))
    assert len(found) == KILLS * rounds
    lost = [one for one in found if not one["kept"] or not one["identical"] or one["beside"] != ["c.zarr"]]
    shut = [one for one in found if one["kind"] == "growth" and one["opened"] not in (11, 22)]
    return {"kills": len(found), "wrong": len(lost) + len(shut)}


def several(folder: Path, quick: bool) -> dict[str, Any]:
    found = program("several", str(folder))
    return {"scenarios": len(found), "wrong": sum(not one["identical"] for one in found.values())}


def full_disk(folder: Path, quick: bool) -> dict[str, Any]:
    found = program("full_disk", str(folder), before=("unshare", "-Urm"))
    if found is None:
        return {"skipped": "no tmpfs can be mounted here", "wrong": 0}
    good = found["sound"] and found["identical"] and found["written"] == found["shards"] - found["committed"]
    return {"committed": found["committed"], "wrong": int(not good)}


def storage(folder: Path, quick: bool) -> dict[str, Any]:
    """Write and read caches in S3 that loses answers, cuts, shortens and empties bodies, redirects and drips."""
    found = program("misbehaving", str(folder), *(("1", "3") if quick else ("20",)))
    wrong = {name: one["wrong"] for name, one in found.items() if one["wrong"]}
    rounds, slowest = (sum(one["rounds"] for one in found.values()), max(one["slowest"] for one in found.values()))
    faults = sum(one["faults"] for one in found.values())
    return {
        "rounds": rounds,
        "faults": faults,
        "slowest_command": slowest,
        "wrong": sum(wrong.values()),
        "cases": wrong,
    }


def damage(folder: Path, quick: bool) -> dict[str, Any]:
    """Flip a bit of a file, or cut it short, and see whether `verify` tells."""
    cache = _cache(folder / "c.zarr")
    files = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    generator, names, missed = random.Random(1), list(files), []
    count = 200 if quick else 1000
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


CASES: tuple[Callable[[Path, bool], dict[str, Any]], ...] = (kills, several, full_disk, storage, damage)


def main() -> int:
    """Run every case and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of each, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    configure(quiet=True)
    results = {}
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="logitcache-faults-") as folder:
            started = time.perf_counter()
            results[case.__name__] = case(Path(folder), options.quick) | {"seconds": 0.0}
            results[case.__name__]["seconds"] = round(time.perf_counter() - started, 1)
        if not options.json:
            print(f"{case.__name__:10} {results[case.__name__]}", flush=True)
    if options.json:
        print(json.dumps({"results": results, "goal": "nothing wrong", "versions": versions()}, indent=2))
    return int(any(result["wrong"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
