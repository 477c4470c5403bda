"""Does a cache survive what happens to computers?

    python benchmarks/faults.py [--quick] [--json] [--state FILE]

Kills every command that writes at 1,000 moments of its life, and the workers of a Dask cluster while they start; flips
bits of, or truncates, 1,000 files of a cache; fills a small disk, and shared memory; lets several processes write one
cache while some are killed; writes and reads caches in storage that loses, cuts and delays answers.
Run from a checkout, whose tests have the programs that do this. What is done is noted in the state file: the same
command continues where it was stopped, and removes the file at its end. Exits 1 if anything committed is lost, anything
bad is accepted, a command hangs, or the bytes differ from those of an undisturbed run.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError
from logitcache.runtime.console import configure
from logitcache.runtime.versions import versions
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from _harness import exit_code, parser_of, print_json  # noqa: E402
from fault_kills import Kills  # noqa: E402  # which needs the tests

from tests.stage_one.apart import ended, forked  # noqa: E402

HANGS = 3600
"""Seconds after which a program counts as hanging, however slow the machine is; what it runs has closer bounds."""

PIPED = ("64k", "160k")
"""Sizes of shared memory that hold the workers' locks, and no images: these come through a pipe."""


class State:
    """What earlier runs of the same command found, line by line in a file."""

    def __init__(self, file: Path, run: dict[str, Any]) -> None:
        self.file, self.run = file, run
        text = file.read_text() if file.exists() else ""
        # The last line may be half written.
        lines = text.rpartition("\n")[0].splitlines() or [json.dumps(["run", run])]
        self._found = dict(map(json.loads, lines))
        if self._found.get("run") != run:
            raise SystemExit(f"{file} is of another run: {self._found.get('run')}. Fix: remove it, or --state another")
        file.write_text("".join(json.dumps([key, value]) + "\n" for key, value in self._found.items()))

    def once(self, key: str, action: Callable[[], Any]) -> Any:
        """Return what an action found, now or in an earlier run."""
        if key not in self._found:
            self._found[key] = action()
            with self.file.open("a") as file:
                file.write(json.dumps([key, self._found[key]]) + "\n")
        return self._found[key]


def program(name: str, *arguments: str, before: tuple[str, ...] = ()) -> Any:
    """Run a program of the tests, which prints JSON; None if this machine cannot run it."""
    command = [*before, sys.executable, "-m", f"tests.{name}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=HANGS)
    if done.returncode == 77 or (before and done.returncode and "unshare" in done.stderr):
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def kills(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Kill every command that writes, once or twice, and run it again; two processes do so at a time."""
    commands, numbers = Kills(folder), range(100 if quick else 1000)

    def some(first: int) -> int:
        for number in numbers[first::2]:
            state.once(f"kill {number}", lambda number=number: commands.wrong(number))  # type: ignore[misc]
        return 0

    codes = [ended(child, 10 * HANGS) for child in (forked(lambda: some(0)), forked(lambda: some(1)))]
    if any(codes):
        raise SystemExit(f"processes that kill ended with {codes}")
    found = State(state.file, state.run)
    wrong = [text for number in numbers for text in found.once(f"kill {number}", list)]
    return {"kills": len(numbers), "wrong": len(wrong), "cases": wrong}


def starting(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Kill workers of a cluster of this machine while they start."""
    count = 2 if quick else 12
    found = program("teacher.starting", str(folder), str(count))
    return {"kills": found["killed"], "wrong": int(found["killed"] < count) + int(not found["identical"])}


def several(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Let several processes write one cache, of which some are killed and some wait for others."""
    found = program("teacher.several", str(folder))
    return {"scenarios": len(found), "wrong": sum(not one["identical"] for one in found.values())}


def full_disk(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Fill a disk, and continue with more room."""
    found = program("teacher.full_disk", str(folder), before=("unshare", "-Urm"))
    if found is None:
        return {"skipped": "no tmpfs can be mounted here", "wrong": 0}
    good = found["sound"] and found["identical"] and found["written"] == found["shards"] - found["committed"]
    return {"committed": found["committed"], "wrong": int(not good)}


def full_memory(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Render by processes whose shared memory holds no image: the same images, or an error within seconds."""
    found = program("views.small_shared_memory", before=("unshare", "-Urm"))
    if found is None:
        return {"skipped": "no tmpfs can be mounted here", "wrong": 0}
    lost = [size for size, one in found.items() if not one["identical"] and (size in PIPED or not one["error"])]
    return {"sizes": list(found), "wrong": len(lost) + sum(one["seconds"] > 60 for one in found.values())}


def storage(folder: Path, quick: bool, state: State) -> dict[str, Any]:
    """Write and read caches in S3 that loses answers, cuts, shortens and empties bodies, redirects and drips."""
    found = program("teacher.misbehaving", str(folder), *(("1", "3") if quick else ("20",)))
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


def damage(folder: Path, quick: bool, state: State) -> dict[str, Any]:
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


Case = Callable[[Path, bool, State], dict[str, Any]]
CASES: tuple[Case, ...] = (
    kills,  # first, as it forks: this process must have no threads
    starting,
    several,
    full_disk,
    full_memory,
    storage,
    damage,
)


def main() -> int:
    """Run every case and print what it found."""
    parser = parser_of(__doc__, "fewer of each, under a minute")
    parser.add_argument("--state", type=Path, default=Path("faults.state"), help="where to note what is done")
    options = parser.parse_args()
    configure(quiet=True)
    state = State(options.state, {"quick": options.quick, "versions": versions()})

    def found(case: Case) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="logitcache-faults-") as folder:
            result: dict[str, Any] = state.once(case.__name__, lambda: _timed(case, Path(folder), options.quick, state))
        if not options.json:
            print(f"{case.__name__:11} {result}", flush=True)
        return result

    first, *others = CASES
    results = {first.__name__: found(first)}
    with ThreadPoolExecutor(2) as pool:  # most of them run programs
        results |= {case.__name__: result for case, result in zip(others, pool.map(found, others), strict=True)}
    state.file.unlink()
    if options.json:
        print_json(results, goal="nothing wrong")
    return exit_code(not result["wrong"] for result in results.values())


def _timed(case: Case, *given: Any) -> dict[str, Any]:
    started = time.perf_counter()
    return case(*given) | {"seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
