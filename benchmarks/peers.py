"""Beside peers: what do other programs take to distil the same teacher into the same student, by their own commands?

    python benchmarks/peers.py --peers PYTHON --checkouts DIR [--out DIR] [--epochs N] [--seeds N] [--programs a,b]
    python benchmarks/peers.py --quick [--json]

PYTHON is an interpreter where the peers are installed, an environment of its own; DIR holds checkouts of the
repositories of torchdistill and timm, whose training scripts are not in their wheels. What is not there is printed as
not installed, with the line that installs it. The commands and configurations are in _peer_programs.py:

    logitcache      `precompute` of a view for each epoch, then `train-student`
    torchdistill    examples/torchvision/image_classification.py with a KDLoss
    timm            train.py --kd-model-name
    keras           `keras.distillation.Distiller` on torch, with torchvision's data sets
    lightly-train   `lightly-train pretrain`: it distils features and has no labels, so that no classifier is judged

All have the same images (PNG files of Fashion-MNIST, 32 px, RGB), teacher (ResNet-50, trained here on them), student
(ResNet-18), crops and flips, batch size, steps, SGD at a constant learning rate, and 0.1 cross-entropy + 0.9 KL
divergence at T = 4; one thread and no worker processes. Each seed runs every program in turn, who begins changes. A
command is measured as a whole, as the system accounts for it: CPU time, which others on the machine change less, and
peak memory. It runs for one epoch and for `--epochs`: images/s follow from the difference, so that the start does not
count; an epoch of each ends with a measurement on the validation images, but for lightly-train. The time for k students
is computed: k times the command, and for logitcache `precompute` once.

Every command is a folder in OUT, by default runs/peers: the same command continues and runs nothing twice. `--quick` is
one seed of few images, which shows that everything runs, and no more. There is no goal: the table is the result.
Exits 1 if a program fails.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _harness import parser_of, print_json
from _peer_inputs import write_images, write_weights
from _peer_programs import PROGRAMS, Run, json_top1, precompute, train_teacher

OURS, CACHE = "logitcache", "cache"
COST = "cost.json"
STUDENTS = (1, 2, 5, 20)
QUICK = {"seeds": 1, "images": 320, "validation": 100, "epochs": 2, "teacher_epochs": 1}
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LIGHTLY_TRAIN_EVENTS_DISABLED"), "1"),
    **{"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
}
MIB = 2**10
"""Kibibytes, in which Linux states memory."""


class CommandError(Exception):
    """A command that failed."""


@dataclass(frozen=True)
class Cost:
    """What a command took: CPU and elapsed seconds, the most memory of a process of it in MiB, and the top-1."""

    cpu: float
    elapsed: float
    memory: float
    top1: float | None = None


Costs = Mapping[tuple[str, int, int], Cost]
"""Costs by program, seed and epochs."""


def measured(argv: Sequence[str], folder: Path) -> tuple[Cost, str]:
    """Run a command in a folder; return its cost and output. Raises CommandError with the end of the output."""
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )
        started = os.times().elapsed
        status, usage = os.wait4(process.pid, 0)[1:]
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    if process.returncode:
        raise CommandError(f"{' '.join(argv[:3])} … exited with {process.returncode}, {log}: …{text[-800:]}")
    # A forked process counts the memory of the one that it came from until it executes another program.
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise CommandError(f"{argv[0]} took no more memory than this process, which hides what it took")
    elapsed = os.times().elapsed - started
    return Cost(usage.ru_utime + usage.ru_stime, elapsed, usage.ru_maxrss / MIB), text


def prepare(arguments: argparse.Namespace) -> float:
    """Write the images and train the teacher, unless they are there; return the teacher's top-1."""
    teacher = arguments.out / "teacher"
    done = arguments.out / "teacher.json"
    if not done.exists():
        # In a process of its own: memory of this one would hide that of the programs.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(
                write_images,
                arguments.out / "images",
                {"train": arguments.images, "validation": arguments.validation},
            ).result()
            run = run_of(arguments, sys.executable, "train-teacher", 0, arguments.teacher_epochs)
            output = measured(train_teacher(run), run.out)[1]
            pool.submit(write_weights, teacher).result()
        done.write_text(json.dumps({"top1": json_top1(output, 0)}))
    return float(json.loads(done.read_text())["top1"])


def run_of(arguments: argparse.Namespace, python: str, name: str, seed: int, epochs: int) -> Run:
    """Return what a command is given; its folder is made, and emptied of a command that was stopped."""
    out = arguments.out / f"{name}-{seed}-{epochs}"
    if not (out / COST).exists():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    return Run(python, arguments.checkouts, arguments.out / "images", arguments.out / "teacher", out, epochs, seed)


def cost_of(arguments: argparse.Namespace, name: str, seed: int, epochs: int) -> Cost:
    """Run the command of a program, or read what it took."""
    python = sys.executable if name in (OURS, CACHE) else arguments.peers
    run = run_of(arguments, python, name, seed, epochs)
    kept = run.out / COST
    if not kept.exists():
        if name == CACHE:
            cost = measured(precompute(run), run.out)[0]
        else:
            cost, output = measured(PROGRAMS[name].command(run), run.out)
            cost = Cost(cost.cpu, cost.elapsed, cost.memory, PROGRAMS[name].top1(output, epochs))
        kept.write_text(json.dumps(asdict(cost)))
    return Cost(**json.loads(kept.read_text()))


def version_of(python: str | None, distribution: str) -> str | None:
    """Return the version of a distribution in an interpreter's environment, None if it is not there."""
    if python is None:
        return None
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def installed(arguments: argparse.Namespace, name: str) -> str | None:
    """Return the version of a program, None if it or its script is not there."""
    program = PROGRAMS[name]
    if program.script and not (arguments.checkouts / program.script).is_file():
        return None
    return version_of(sys.executable if name == OURS else arguments.peers, program.distribution)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and sample deviation, which of one value is 0."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def row_of(name: str, costs: Costs, seeds: Sequence[int], epochs: int, images: int) -> dict[str, Any]:
    """Return the figures of a program over seeds; `images` are those of an epoch."""
    short, long = ([costs[name, seed, count] for seed in seeds] for count in (1, epochs))
    rates = [images * (epochs - 1) / (more.cpu - one.cpu) for one, more in zip(short, long, strict=True)]
    before = [costs[CACHE, seed, epochs].cpu if name == OURS else 0.0 for seed in seeds]
    memory = max(cost.memory for cost in long)
    if name == OURS:
        memory = max(memory, *(costs[CACHE, seed, epochs].memory for seed in seeds))
    tops = [cost.top1 for cost in long if cost.top1 is not None]
    totals = {
        str(count): spread([one + count * cost.cpu for one, cost in zip(before, long, strict=True)])
        for count in STUDENTS
    }
    return {
        "program": name,
        "images_per_second": spread(rates),
        "memory_mib": round(memory),
        "top1": spread(tops) if tops else None,
        "seconds_of_students": totals,
        "seeds": list(seeds),
    }


def wins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List what peers do better than logitcache."""
    ours = next(row for row in rows if row["program"] == OURS)
    found = []
    for row in rows:
        name = row["program"]
        if row["images_per_second"]["mean"] > ours["images_per_second"]["mean"]:
            found.append(f"{name} takes less time for an image of a student's training")
        if row["memory_mib"] < ours["memory_mib"]:
            found.append(f"{name} takes less memory")
        if row["top1"] and ours["top1"] and row["top1"]["mean"] > ours["top1"]["mean"]:
            found.append(f"{name} has a higher mean top-1")
        for count, total in row["seconds_of_students"].items():
            if total["mean"] < ours["seconds_of_students"][count]["mean"]:
                found.append(f"{name} takes less time for {count} student{'s' * (count != '1')}")
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    heads = [f"k = {count}" for count in STUDENTS]
    print("| program | images/s | memory, MiB | top-1, % | " + " | ".join(heads) + " |")
    print("| --- " * (4 + len(heads)) + "|")
    for row in rows:
        rate, top1 = row["images_per_second"], row["top1"]
        cells = [
            row["program"],
            f"{rate['mean']:.0f} ± {rate['std']:.0f}",
            str(row["memory_mib"]),
            f"{100 * top1['mean']:.1f} ± {100 * top1['std']:.1f}" if top1 else "–",
            *(f"{total['mean']:.0f} ± {total['std']:.0f}" for total in row["seconds_of_students"].values()),
        ]
        print("| " + " | ".join(cells) + " |")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, "one seed of few images")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter where the peers are installed")
    parser.add_argument("--checkouts", type=Path, default=Path("checkouts"), help="folder of the peers' repositories")
    parser.add_argument("--out", type=Path, help="folder of the runs; of --quick a temporary one")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="with commas; by default all")
    parser.add_argument("--images", type=int, default=1920, help="training images, a multiple of 10 and of the batch")
    parser.add_argument("--validation", type=int, default=500, help="validation images, a multiple of 10")
    parser.add_argument("--epochs", type=int, default=4, help="of every student, at least 2")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.programs = arguments.programs.split(",")
    if unknown := [name for name in arguments.programs if name not in PROGRAMS]:
        parser.error(f"--programs {unknown} are not among {', '.join(PROGRAMS)}")
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2")
    arguments.checkouts = arguments.checkouts.resolve()
    return arguments


def run_all(arguments: argparse.Namespace, names: Sequence[str]) -> tuple[dict[tuple[str, int, int], Cost], list[str]]:
    """Run every program with every seed in turn; return costs, and the programs that failed, which are printed."""
    costs: dict[tuple[str, int, int], Cost] = {}
    failed: list[str] = []
    for seed in range(arguments.seeds):
        turn = seed % len(names)
        for name in [*names[turn:], *names[:turn]]:
            for epochs in (1, arguments.epochs):
                try:
                    for job in (CACHE, OURS) if name == OURS else (name,):
                        if name not in failed:
                            costs[job, seed, epochs] = cost_of(arguments, job, seed, epochs)
                            print(f"{job}, seed {seed}, {epochs} epochs: {costs[job, seed, epochs]}", file=sys.stderr)
                except CommandError as error:
                    failed.append(name)
                    print(f"{name} failed: {error}", file=sys.stderr)
    return costs, failed


def main() -> int:
    """Run what has not yet been run, and print the table."""
    arguments = parse()
    versions = {name: installed(arguments, name) for name in arguments.programs}
    missing = {name: PROGRAMS[name].pip for name, version in versions.items() if version is None}
    names = [name for name, version in versions.items() if version is not None]
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = (arguments.out or Path(temporary if arguments.quick else "runs/peers")).resolve()
        arguments.out.mkdir(parents=True, exist_ok=True)
        teacher = prepare(arguments)
        costs, failed = run_all(arguments, names)
    seeds = range(arguments.seeds)
    rows = [row_of(name, costs, seeds, arguments.epochs, arguments.images) for name in names if name not in failed]
    conditions = {name: getattr(arguments, name) for name in ("images", "validation", "epochs", "seeds")}
    conditions |= {"teacher_top1": teacher, "programs": versions, "failed": failed}
    if arguments.json:
        print_json(rows, conditions=conditions, not_installed=missing)
    else:
        show(rows)
        print(conditions, *(f"not installed: {name}: {line}" for name, line in missing.items()), sep="\n")
        if OURS in names:
            print(*(f"where they win: {line}" for line in wins(rows)), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
