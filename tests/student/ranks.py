"""Processes that train together over gloo on loopback, forked so that they are warm as this one is."""

import json
import os
import socket
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from logitcache.student.learner import Learner
from logitcache.student.training import train
from logitcache.student.training_recipes import TrainingRecipe

Ended = list[tuple[int, str]]


def together(size: int, out: Path, work: Callable[[int], object]) -> Ended:
    """Run work(rank) in each of so many processes, as torchrun would; returns exit codes and what is on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"stderr{rank}" for rank in range(size)]
    children = [_forked(rank, size, port, file, work) for rank, file in enumerate(files)]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    del store
    return [(code, file.read_text()) for code, file in zip(codes, files, strict=True)]


def _forked(rank: int, size: int, port: int, stderr: Path, work: Callable[[int], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        work(rank)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)


def at_step(step: int, action: Callable[[], object]) -> None:
    """Do something at the end of a step; for a child, which ends with this."""
    end_step = Learner.end_step

    def spy(self: Learner) -> None:
        end_step(self)
        if self.step == step:
            action()

    Learner.end_step = spy  # type: ignore[method-assign]


def train_together(
    size: int, recipe: TrainingRecipe, resume: bool = False, before: Callable[[int], object] = lambda rank: None
) -> Ended:
    """Train on several ranks, each of which leaves what `seen` reads."""
    out = Path(recipe.out)
    notes = out.with_name(f"{out.name} of {size}")

    def work(rank: int) -> None:
        note = _noted(notes / f"{rank}.json")
        before(rank)
        train(recipe, resume=resume)  # type: ignore[arg-type]
        note()

    return together(size, notes, work)


def seen(recipe: TrainingRecipe, size: int) -> list[dict[str, Any]]:
    """Return of each rank [step, terms, rows] of its micro-batches, and checksums of the weights after each step."""
    out = Path(recipe.out)
    return [json.loads((out.with_name(f"{out.name} of {size}") / f"{rank}.json").read_text()) for rank in range(size)]


def _noted(file: Path) -> Callable[[], object]:
    found: dict[str, list[Any]] = {"terms": [], "weights": []}
    add, end_step = Learner.add, Learner.end_step

    def add_noted(self: Learner, terms: Tensor, rows: Tensor) -> None:
        found["terms"].append([self.step, terms.tolist(), rows.tolist()])
        add(self, terms, rows)

    def end_noted(self: Learner) -> None:
        end_step(self)
        state = [value.detach().numpy().tobytes() for value in self.trained.parameters()]
        found["weights"].append(zlib.crc32(b"".join(state)))

    Learner.add, Learner.end_step = add_noted, end_noted  # type: ignore[method-assign]
    return lambda: file.write_text(json.dumps(found))
