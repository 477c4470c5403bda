"""What does the trial step cost that a student takes before its first?

    python benchmarks/trial.py [--quick] [--json] [--folder DIR]

Students of growing cost are trained for one epoch on a cache of random images, with the loss on logits alone; the trial
within is timed by the clock. It must take less than a second beside the start of the model. Exits 1 when a goal is
missed.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _harness import Row, parser_of, run_benchmark
from torch import nn

from logitcache.config.recipe import load_recipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student import training
from logitcache.student.training_recipes import StudentRecipe

CASES = (
    ("small_cnn, 32 px", {"kind": "small_cnn", "width": 8}, 32),
    ("resnet18, 64 px", {"kind": "torchvision", "name": "resnet18", "weights": None}, 64),
    ("mobilenet_v3_small, 224 px", {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": None}, 224),
    ("resnet50, 224 px", {"kind": "torchvision", "name": "resnet50", "weights": None}, 224),
)
NUM_IMAGES, BATCH, NUM_CLASSES = 40, 32, 1000
NORMALISED = {"mean": [0.5] * 3, "std": [0.25] * 3}
GOAL_SECONDS = 1.0


class Teacher(nn.Module):
    """Logits that depend on the image, for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Answer."""
        logits: torch.Tensor = self.head(images.mean(dim=(2, 3)))
        return logits


def trial_seconds(folder: Path, model: dict[str, Any], size: int) -> float:
    """Train for one epoch and return the seconds of the trial."""
    cache = folder / "c.zarr"
    images = [(torch.randint(256, (3, size, size), dtype=torch.uint8), -1) for _ in range(NUM_IMAGES)]
    recipe = {"cache": str(cache), "teachers": {"t": {"preprocessing": NORMALISED}}, "num_workers": 0, "device": "cpu"}
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers={"t": Teacher()}, dataset=images)
    student = {
        "cache": str(cache),
        "out": str(folder / "run"),
        "model": model,
        "preprocessing": NORMALISED,
        "losses": [{"kind": "kl_divergence"}],
        "epochs": 1,
        "batch_size": BATCH,
        "num_workers": 0,
        "device": "cpu",
    }
    taken = []

    def timed(*arguments: Any) -> None:
        started = time.monotonic()
        require_trainable(*arguments)
        taken.append(time.monotonic() - started)

    require_trainable = training.require_trainable
    with patch.object(training, "require_trainable", timed):
        training.train(load_recipe(student, StudentRecipe), dataset=images)
    (seconds,) = taken
    return seconds


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure each student; the fastest of the rounds counts."""
    for number, (case, model, size) in enumerate(CASES):
        rounds = range(1 if quick else 3)
        seconds = min(trial_seconds(folder / f"{number}-{round_}", model, size) for round_ in rounds)
        yield Row(case, seconds, GOAL_SECONDS, "s", at_most=True, note="the trial step, by the clock")


if __name__ == "__main__":
    sys.exit(run_benchmark(parser_of(__doc__, "one round", "where the caches go"), rows_of, 30, num_threads=None))
