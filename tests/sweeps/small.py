"""Small sweeps: their recipes, models that fail, and their runs trained alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.config.recipe import load_recipe
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.search.trials import TrialResult
from logitcache.sweeps.sweep import SweepResult, sweep
from logitcache.sweeps.sweep_recipe import SweepRecipe
from tests.student.small import LINEAR, TEST_IMAGES, TINY, metrics, weights

VALIDATION = {"dataset": TEST_IMAGES, "batch_size": 40}
CODE = {"kind": "custom", "factory": "tests.sweeps.small:"}


def swept(cache: Path, *, student: dict[str, Any] | None = None, **entries: Any) -> SweepRecipe:
    """A sweep of students of two epochs of seven steps, the last of which is short."""
    base = {"cache": str(cache), "model": TINY, "epochs": 2, "batch_size": 32, "num_workers": 0, "device": "cpu"}
    return load_recipe({"kind": "sweep", "student": base | (student or {})} | entries, SweepRecipe)


def run(cache: Path, out: Path, **entries: Any) -> SweepResult:
    return sweep(swept(cache, **entries), out)


def alone(run: Path, out: Path) -> RunResult:
    """Train the recipe that a run of a sweep has recorded, by itself."""
    return train(load_recipe(run / "recipe.yaml", StudentRecipe, [f"out={json.dumps(str(out))}"]))


def assert_same(run: Path, other: Path) -> None:
    assert weights(run) == weights(other)
    assert metrics(run) == metrics(other)
    names = [{file.name for file in path.iterdir()} for path in (run, other)]
    assert names[0] == names[1]
    if (run / "adapters.safetensors").exists():
        assert (run / "adapters.safetensors").read_bytes() == (other / "adapters.safetensors").read_bytes()


class StochasticDepth(nn.Module):
    """Skips a block for each image by a draw of the global generator, from the tenth step on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(49, 20), nn.Linear(20, 20), nn.Linear(20, 10)
        self.pool = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(self.pool(images))
        self.steps += self.training
        kept = torch.rand(len(images), 1) < 0.5 if self.training and self.steps > 10 else 1.0
        return self.head(features + kept * self.block(features))


def stochastic_depth() -> nn.Module:
    return StochasticDepth()


class Failing(nn.Module):
    """A linear model whose forward pass raises at a step of training, and never if the step is 0."""

    def __init__(self, at: int, error: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))
        self.at, self.error, self.steps = at, error, 0

    def __deepcopy__(self, memo: Any) -> nn.Module:
        """Let the trial step find nothing."""
        return Failing(0, self.error)

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory") if self.error == "memory" else ZeroDivisionError("mine")
        return self.layers(images)  # type: ignore[no-any-return]


def failing(at: int = 0, error: str = "mine") -> nn.Module:
    return Failing(at, error)


FEW_IMAGES = {"dataset": {"kind": "bundled", "split": "test", "num_images": 40}, "batch_size": 40}
STUDENT = {"model": LINEAR, "validation": FEW_IMAGES, "batch_size": 100}
LR = {"kind": "log_uniform", "low": 1e-5, "high": 0.1}
KINDS = ["random", "optuna"]


def searched(cache: Path, out: Path, kind: str = "random", **entries: Any) -> SweepResult:
    """Search learning rates of a linear student; entries of a sweep stand beside those of its search."""
    if kind == "optuna":
        pytest.importorskip("optuna")
    of_sweep = {key: entries.pop(key) for key in ("student", "halving", "cells", "seeds", "baseline") if key in entries}
    of_sweep["student"] = STUDENT | of_sweep.get("student", {})
    search = {"kind": kind, "space": {"optimizer.lr": LR}, "trials": 4, "batch": 2} | entries
    return run(cache, out, search=search, **of_sweep)


def run_of(out: Path, trial: TrialResult, seed: int = 0) -> Path:
    return out / "runs" / f"{trial.cell},seed={seed}"
