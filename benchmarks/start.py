"""How long does a command take to begin, against `python -c 'import torch'`?

    python benchmarks/start.py [--quick] [--json]

Each command is a process of its own on a cache of 40 bundled images; all take turns. A figure is the CPU time of the
fastest of the rounds beyond that of importing torch alone, or, of the help, beyond an empty Python program: other
processes on the machine change it least. Exits 1 if a goal is missed.
"""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from _harness import Row, parser_of, run_benchmark

IMAGES = ("dataset.num_images=40", "shard_rows=16", "batch_size=16", "device=cpu", "num_workers=0")
STUDENT = ("epochs=1", "batch_size=16", "device=cpu", "num_workers=0")
PIPELINES = Path(__file__).parent.parent / "pipelines" / "fashion_mnist"
TORCH, PYTHON = [sys.executable, "-c", "import torch"], [sys.executable, "-c", ""]


def command(*words: object, changes: tuple[str, ...] = ()) -> list[str]:
    """Return a command line with changes of its recipe."""
    settings = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "logitcache", *map(str, words), *settings]


def cpu_seconds(words: list[str]) -> float:
    """Run a process; return its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield what each command takes. The first round makes the cache, and this machine's memory of its digests."""
    cache, test, run = folder / "train.zarr", folder / "test.zarr", folder / "run"
    precompute = command(
        "precompute", PIPELINES / "precompute.yaml", changes=(f"cache={cache}", "views.num_views=2", *IMAGES)
    )
    testing = command("precompute", PIPELINES / "precompute_test.yaml", changes=(f"cache={test}", *IMAGES))
    student = (f"out={run}", f"cache={cache}", f"validation.cache={test}", "schedule.warmup_epochs=0", *STUDENT)
    # The goal of 0.5 s is that of the two commands that read a cache alone; of the others the figure is shown.
    commands = {
        "inspect": (command("inspect", cache), 0.5),
        "verify": (command("verify", cache), 0.5),
        "summary": (command("summary", cache), None),
        "precompute, complete": (precompute, None),
        "train-student, finished": (
            command("train-student", PIPELINES / "student.yaml", "--resume", changes=student),
            None,
        ),
        "inspect --help": (command("inspect", "--help"), 0.5),
    }
    cpu_seconds(testing), cpu_seconds(precompute)
    subprocess.run(
        command("train-student", PIPELINES / "student.yaml", changes=student), check=True, capture_output=True
    )
    programs = {"import torch": TORCH, "python": PYTHON} | {name: words for name, (words, _) in commands.items()}
    for words in programs.values():
        cpu_seconds(words)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(2 if quick else 6):
        for name, words in programs.items():
            times[name].append(cpu_seconds(words))
    fastest = {name: min(found) for name, found in times.items()}
    yield Row("import torch", fastest["import torch"], 0, "s")
    for name, (_, goal) in commands.items():
        base = "python" if name.endswith("--help") else "import torch"
        found = fastest[name] - fastest[base]
        yield Row(name, found, goal or 0, "s", at_most=goal is not None, note=f"beyond {base}")


if __name__ == "__main__":
    sys.exit(
        run_benchmark(
            parser_of(__doc__, "two rounds", "folder of the cache and the run"), rows, width=26, num_threads=None
        )
    )
