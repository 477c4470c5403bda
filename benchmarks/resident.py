"""How near does training on a small set come to a bare loop over ready tensors?

    python benchmarks/resident.py [--quick] [--json]

A student of 7 thousand parameters learns from a cache of bundled images, padded, cropped and mirrored. Theirs: a loop
that normalises a ready batch of pixels, computes the same loss with ready logits, and steps, in the student's memory
format and with its optimiser (fused, weights alone decay); `plain` is the same as torch builds both. All take turns,
batch by batch, with one thread, and a figure is the CPU time of an epoch of theirs over that of ours, the median over
the epochs: rendering, reading of targets and the loop itself are ours alone. Exits 1 if a goal is missed.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _harness import Row, parser_of, run_benchmark
from torch import Tensor, nn
from torch.nn import functional

from logitcache.config.recipe import load_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.runs.training_run import TrainingRun
from logitcache.student.training import train
from logitcache.student.training_data import Stream
from logitcache.student.training_recipes import StudentRecipe
from logitcache.targets import Batch

AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
EPOCHS, GOAL = 6, 0.95
WAYS: dict[str, tuple[object, float]] = {"resident (num_workers: auto)": ("auto", GOAL), "num_workers: 0": (0, 0.0)}


def bare_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """Return the step of a loop that a user writes, on a model of uint8 pixels."""

    def step(pixels: Tensor, logits: Tensor) -> None:
        found, wanted = torch.log_softmax(model(pixels), dim=1), torch.log_softmax(logits, dim=1)
        functional.kl_div(found, wanted, reduction="batchmean", log_target=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Turns:
    """CPU seconds of each epoch: of ours, and of the bare loops that follow it, on the tensors of its batches."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._loops: dict[str, Callable[[Tensor, Tensor], None]] = {}
        self._since = 0.0

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Begin an epoch."""
        self._since = time.process_time()
        self.epochs.append(dict.fromkeys(("ours", "same", "plain"), 0.0))
        yield from batches

    def step(self, run: TrainingRun, step: Callable[[], None], batch: Batch) -> None:
        """Take our step on a batch, and those of the bare loops on its tensors; who begins changes each time."""
        self._clock("ours")  # what made the batch
        if not self._loops:
            same, plain = (copy.deepcopy(run.learner.model) for _ in range(2))
            plain.to(memory_format=torch.contiguous_format)
            self._loops = {
                "same": bare_loop(same, run.recipe.optimizer.build(same, fused=True)),
                "plain": bare_loop(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3)),
            }
        pixels, logits = batch.images.clone(), batch.targets.logits.clone()
        works = [("ours", step)]
        works += [(name, partial(loop, pixels, logits)) for name, loop in self._loops.items()]
        first = run.learner.step % len(works)
        self._since = time.process_time()
        for name, work in works[first:] + works[:first]:
            work()
            self._clock(name)

    def _clock(self, name: str) -> None:
        """Add the time since the last call to one of those that take turns."""
        now = time.process_time()
        self.epochs[-1][name] += now - self._since
        self._since = now

    def ratio(self, name: str) -> float:
        """Return how often as fast ours is; the first epoch warms up."""
        return statistics.median(times[name] / times["ours"] for times in self.epochs[1:])


@contextmanager
def measured(turns: _Turns) -> Iterator[None]:
    """Have training report to `turns` before an epoch, and at each step."""
    step, batches = TrainingRun.step, Stream.batches
    with (
        patch.object(TrainingRun, "step", lambda run, batch: turns.step(run, lambda: step(run, batch), batch)),
        patch.object(Stream, "batches", lambda *arguments: turns.batches(batches(*arguments))),
    ):
        yield


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure both ways of making batches."""
    cache, size = folder / "cache.zarr", {"kind": "bundled", "num_images": 1000 if quick else 5000}
    stage_one: dict[str, Any] = {"cache": str(cache), "dataset": size, "num_workers": 0, "device": "cpu"}
    stage_one |= {"views": {"num_views": EPOCHS, "augmentations": AUGMENTATIONS}}
    precompute(load_recipe(stage_one | {"teachers": {"teacher": {"model": {"kind": "bundled"}}}}, PrecomputeRecipe))
    for batch_size in (64, 256):
        for way, (num_workers, goal) in WAYS.items():
            student = {"cache": str(cache), "out": str(folder / f"{batch_size}-{num_workers}"), "device": "cpu"}
            student |= {"model": {"kind": "small_cnn", "width": 8}, "batch_size": batch_size}
            recipe = load_recipe(student | {"epochs": EPOCHS, "num_workers": num_workers}, StudentRecipe)
            turns = _Turns()
            with measured(turns):
                train(recipe)
            note = f"{turns.ratio('plain'):.2f} of a loop as torch builds it"
            yield Row(f"batches of {batch_size}, {way}", turns.ratio("same"), goal, note=note)


if __name__ == "__main__":
    sys.exit(run_benchmark(parser_of(__doc__, "1,000 images", "where the cache goes"), rows_of, 48))
