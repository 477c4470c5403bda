"""Do two checkouts give the same stores, weights and metrics, byte for byte?

    python benchmarks/compare_checkouts.py OLD NEW [--recipes TEXT] [--quick] [--json] [--keep DIR]

OLD and NEW are folders or git revisions. Each runs every recipe of its pipelines/ by its command line, in a process of
its own, on few small images and with random weights (_small_recipes.py): one after the other in the same folder, so
that both record the same paths. All files that a recipe writes are compared byte by byte, but for VARIES and TIMED
below. Prints a line for each recipe, and exits 1 if any differs or fails; then the files of both are kept, and the
folder is named.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _small_recipes import Job, make_inputs, selected

REPOSITORY = Path(__file__).parent.parent

VARIES = {"seconds", "seconds_alone", "seconds_saved", "latency", "images_per_second", "versions", "fused"}
"""The entries of the files in TIMED that are not compared: times, versions, and keys that only one side records."""

TIMED = {
    "result.json",
    "environment.json",
    "metrics.jsonl",
    "metrics.csv",
    "checkpoint.pt",
    "recipe.yaml",
    "sweep.yaml",
    "sweep.json",
}
"""The files of a run whose values are compared; of every other file, each byte."""

TIMED_FOLDERS = {"groups", "architectures"}
"""The folders of a sweep whose files are compared by values, as they record times."""

RUNNER = """
import json, os, signal, sys, time, traceback
import dask.array, numpy, pydantic, torch, torchvision, typer, yaml, zarr
checkout, jobs = json.load(sys.stdin)
sys.path.insert(0, checkout)
import logitcache.cli
assert logitcache.__file__.startswith(checkout + os.sep), logitcache.__file__

def run(lines, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.alarm(300)  # a command that hangs
    torch.set_num_threads(1)
    for line in lines:
        torch.manual_seed(0)  # of teachers without weights
        if code := logitcache.cli.main(line):
            return code
    return 0

waiting, running, done = list(jobs), {}, set()
while waiting or running:
    ready = [job for job in waiting if done.issuperset(job["after"])]
    for job in ready[: 2 - len(running)]:
        waiting.remove(job)
        if (pid := os.fork()) == 0:
            code = 1
            try:
                code = run(job["lines"], job["log"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        running[pid] = job["name"], time.monotonic()
    if not running:
        break  # what is left waits for a job that failed
    pid, status = os.wait()
    if pid in running:
        name, started = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        done |= {name} if code == 0 else set()
        print(json.dumps([name, code, round(time.monotonic() - started, 1)]), flush=True)
"""
"""Run the jobs of stdin with the package of a checkout, two at a time, each in a fork of a process that has torch."""


def compare_folders(old: Path, new: Path) -> str | None:
    """Return the first file that differs, and how; None if all are equal."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (old, new)]
    if names[0] != names[1]:
        name = min(set(names[0]) ^ set(names[1]))
        return f"{name}: only in {'OLD' if name in names[0] else 'NEW'}"
    if not names[0]:
        return "no file was written"
    for name in names[0]:
        if difference := compare_files(old / name, new / name):
            return f"{name}: {difference}"
    return None


def compare_files(old: Path, new: Path) -> str | None:
    """Return how two files differ in other than what VARIES; None if they do not."""
    a, b = old.read_bytes(), new.read_bytes()
    if a == b:
        return None
    if (read := READERS.get(old.suffix)) is not None:
        with contextlib.suppress(ValueError):  # unreadable: compared as bytes
            difference = compare_values(read(a), read(b))
            if difference or old.name in TIMED or old.parent.name in TIMED_FOLDERS:
                return difference
    if len(a) != len(b):
        return f"{len(a)} bytes, then {len(b)}"
    return f"differs at byte {next(at for at in range(len(a)) if a[at] != b[at])} of {len(a)}"


def compare_values(old: Any, new: Any, at: str = "") -> str | None:
    """Return where two values, read from JSON or a checkpoint, differ, by key and in order; None if they do not."""
    if type(old) is not type(new):
        return f"{at} is {old!r:.80}, then {new!r:.80}"
    if isinstance(old, dict):
        keys, others = ([key for key in side if key not in VARIES] for side in (old, new))
        if keys != others:
            return f"{at} has the keys {keys}, then {others}"
        items = [(f"{at}.{key}", old[key], new[key]) for key in keys]
    elif isinstance(old, list | tuple):
        if len(old) != len(new):
            return f"{at} has {len(old)} items, then {len(new)}"
        items = [(f"{at}[{number}]", *pair) for number, pair in enumerate(zip(old, new, strict=True))]
    else:
        items = []
        if _as_bytes(old) != _as_bytes(new):
            was, became = (" ".join(repr(value).split())[:60] for value in (old, new))
            return f"{at} is {was}, then {became}"
    return next((found for where, x, y in items if (found := compare_values(x, y, where))), None)


def _as_bytes(value: Any) -> object:
    """Return a scalar as it is written, since NaN equals itself here, and a tensor as its type, shape and bytes."""
    if not hasattr(value, "untyped_storage"):
        return repr(value)
    tensor = value.detach().cpu().contiguous()
    return str(tensor.dtype), tuple(tensor.shape), bytes(tensor.flatten().view(_uint8()).numpy())


def _uint8() -> Any:
    import torch

    return torch.uint8


def _read_checkpoint(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_yaml(data: bytes) -> Any:
    import yaml

    return yaml.safe_load(data)


READERS: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads,
    ".jsonl": lambda data: [json.loads(line) for line in data.splitlines()],
    ".csv": lambda data: list(csv.DictReader(io.StringIO(data.decode()))),
    ".pt": _read_checkpoint,
    ".yaml": _read_yaml,
}
"""How to read files, to name the value that differs."""


@contextlib.contextmanager
def checkout(name: str) -> Iterator[Path]:
    """Yield a folder as it is, or a revision of this repository in a folder that is removed afterwards."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="logitcache-checkout-") as folder:
        path = Path(folder).resolve() / "checkout"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        if subprocess.run([*git, "add", "--quiet", "--detach", str(path), name]).returncode:
            sys.exit(2)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def require_every_recipe(path: Path, jobs: Sequence[Job]) -> None:
    """Exit if a checkout has a recipe that no job runs."""
    shipped = {str(found.relative_to(path / "pipelines")) for found in (path / "pipelines").rglob("*.yaml")}
    if missing := shipped - {job.recipe for job in jobs}:
        sys.exit(f"{path}/pipelines: no job in benchmarks/_small_recipes.py runs {', '.join(sorted(missing))}")


def run_jobs(path: Path, jobs: Sequence[Job], folder: Path, inputs: Path) -> dict[str, str]:
    """Run jobs with the package of a checkout in an empty folder; return how each failed, if it did."""
    (folder / "logs").mkdir(parents=True)
    logs = {job.name: folder / "logs" / f"{job.name.replace('/', '-')}.txt" for job in jobs}
    orders = [
        {
            "name": job.name,
            "after": [name for name in job.after if name in logs],
            "lines": job.command_lines(path / "pipelines", inputs),
            "log": str(logs[job.name]),
        }
        for job in jobs
    ]
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("LOGITCACHE", "XDG_", "PYTHONHASH"))
    }
    # Workers are processes that import the package themselves.
    environment = inherited | {"PYTHONPATH": str(path), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-P", "-c", RUNNER]
    failed = {job.name: "was not run: what it reads failed" for job in jobs}
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        json.dump([str(path), orders], process.stdin)
        process.stdin.close()
        for line in process.stdout:
            name, code, seconds = json.loads(line)
            print(f"  {name}: {seconds} s", file=sys.stderr)
            failed.pop(name)
            if code:
                said = logs[name].read_text().strip().splitlines() or ["nothing on stderr"]
                failed[name] = f"exits {code}: " + " ".join(said[-2:])
    return failed


def compare(old: Path, new: Path, jobs: Sequence[Job], folder: Path) -> dict[str, str | None]:
    """Run jobs with both checkouts; return the first difference of each job, None if there is none."""
    inputs, run = folder / "inputs", folder / "run"
    inputs.mkdir()
    make_inputs(inputs)
    failed = {}
    for side, path in (("OLD", old), ("NEW", new)):
        print(f"{side} {path}", file=sys.stderr)
        failed[side] = run_jobs(path, jobs, run, inputs)
        run.rename(folder / side)
    found: dict[str, str | None] = {}
    for job in jobs:
        failures = [f"{side} {failed[side][job.name]}" for side in failed if job.name in failed[side]]
        outputs = [folder / side / job.output for side in ("OLD", "NEW")]
        found[job.name] = "; ".join(failures) or compare_folders(*outputs)
    return found


def main() -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="a folder or a git revision")
    parser.add_argument("new", metavar="NEW", help="a folder or a git revision")
    parser.add_argument("--recipes", default="", metavar="TEXT", help="those alone whose name contains it")
    parser.add_argument("--quick", action="store_true", help="few recipes, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="an empty folder in which the files of both are kept")
    arguments = parser.parse_args()
    jobs = selected(arguments.recipes, arguments.quick)
    if not jobs:
        parser.error(f"no recipe's name contains '{arguments.recipes}'")
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="logitcache-compare-")).resolve()
    folder.mkdir(exist_ok=True)
    with checkout(arguments.old) as old, checkout(arguments.new) as new:
        for path in (old, new):
            require_every_recipe(path, selected("", False))
        found = compare(old, new, jobs, folder)
    differs = any(found.values())
    if arguments.json:
        print(json.dumps({"equal": not differs, "recipes": found, "folder": str(folder)}, indent=2))
    else:
        print("\n".join(f"{name:<38} {difference or 'equal'}" for name, difference in found.items()))
    if differs:
        print(f"the files of both are in {folder}", file=sys.stderr)
    elif not arguments.keep:
        shutil.rmtree(folder)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
