"""Kill a sweep again and again at random moments, and look at what is trained twice and what it ends with.

    python -m tests.sweeps.killing DIRECTORY [KILLS] [grid|random|optuna]

One process imports torch once; every run of the sweep is a fork of it. Prints a JSON document.
"""

import json
import os
import random
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from logitcache.runtime.console import configure
from logitcache.student.learner import Learner
from tests.stage_one.apart import ended, forked
from tests.student.small import DROPOUT, TINY, fill, metrics, weights
from tests.sweeps.small import VALIDATION, run

STEPS = 7
"""Steps of an epoch: 200 images in batches of 32."""
SWEEP: dict[str, Any] = {
    "student": {"model": DROPOUT, "validation": VALIDATION, "order_seed": 0, "epochs": 6},
    "grid": {"losses.0.temperature": [1, 4], "model": [DROPOUT, TINY]},
    "seeds": 2,
}
SEARCH: dict[str, Any] = {
    "student": SWEEP["student"] | {"epochs": 2},
    "halving": {"epochs": [1], "keep": 0.5},
    "search": {
        "space": {"losses.0.temperature": [1, 4], "optimizer.lr": {"kind": "log_uniform", "low": 1e-4, "high": 0.1}},
        "trials": 8,
        "batch": 4,
        "finalists": {"seeds": 2},
    },
}


def sweep_of(kind: str) -> dict[str, Any]:
    """Return the entries of a sweep by a grid, or by a kind of search; an Optuna study has two objectives."""
    if kind == "grid":
        return SWEEP
    objectives = ["accuracy", "parameters"] if kind == "optuna" else ["accuracy"]
    return SEARCH | {"search": SEARCH["search"] | {"kind": kind, "objectives": objectives}}


def noting_steps(notes: Path) -> None:
    """Note, in a child that ends with this, every step that a student takes."""
    end_step = Learner.end_step
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(self: Learner) -> None:
        os.write(descriptor, f"{os.getpid()} {self.name} {self.step}\n".encode())  # type: ignore[attr-defined]
        end_step(self)

    Learner.end_step = noted  # type: ignore[method-assign]


def naming_learners() -> None:
    """Let learners know their run."""
    build = Learner.__init__

    def named(self: Learner, recipe: Any, *args: Any, **options: Any) -> None:
        build(self, recipe, *args, **options)
        self.name = Path(recipe.out).name  # type: ignore[attr-defined]

    Learner.__init__ = named  # type: ignore[method-assign]


def killed_at(number: int, calls: int) -> None:
    """Be killed before one of the calls that write to the disk or take a step."""

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, call)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (Learner, "end_step")):
        counted(owner, name)


def kill(folder: Path, kills: int, kind: str = "grid", seed: int = 0) -> dict[str, Any]:
    """Kill a sweep so often, then let it end; return what was found."""
    entries = sweep_of(kind)
    torch.set_num_threads(1)
    cache, moments = fill(folder / "cache"), random.Random(seed)
    notes, out = folder / "notes", folder / "out"

    def session(number: int) -> int:
        configure(quiet=True)
        naming_learners()
        noting_steps(notes)
        if number < kills:
            killed_at(number, moments.randint(1, 45))
        (folder / "result").write_text(repr(run(cache, out, **entries).trials))
        return 0

    endings = []
    for number in range(kills + 1):
        moments.random()  # a fork's draws are its own
        endings.append(ended(forked(lambda number=number: session(number)), 300))  # type: ignore[misc]
    whole = folder / "whole"

    def uninterrupted() -> int:
        (folder / "expected").write_text(repr(run(cache, whole, **entries).trials))
        return 0

    assert ended(forked(uninterrupted), 300) == 0
    names = sorted(path.name for path in (whole / "runs").iterdir())
    pairs = [(whole / "runs" / name, out / "runs" / name) for name in names]
    return {
        "kills": endings.count(-signal.SIGKILL),
        "ended": endings[-1],
        "same": all(kept(a) == kept(b) for a, b in pairs),
        "trials": (folder / "result").read_text() == (folder / "expected").read_text(),
        "runs": len(names),
        "twice": steps_again(notes),
    }


def kept(folder: Path) -> tuple[Any, bytes | None]:
    """Return the metrics of a run, and its weights if it is finished: halving leaves some without."""
    return metrics(folder), weights(folder) if (folder / "weights.safetensors").exists() else None


def steps_again(notes: Path) -> int:
    """Return the most steps that a student took again after a kill."""
    reached: dict[str, int] = defaultdict(int)
    begun: dict[tuple[str, str], int] = {}
    most = 0
    for process, name, step in (line.split() for line in notes.read_text().splitlines()):
        if (process, name) not in begun:
            begun[process, name] = int(step)
            most = max(most, reached[name] - int(step))
        reached[name] = max(reached[name], int(step) + 1)
    return most


if __name__ == "__main__":
    print(json.dumps(kill(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50, *sys.argv[3:4])))
