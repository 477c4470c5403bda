"""A small teacher with BatchNorm, and recipes of images that are made from it."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.classifier import Preprocessing
from logitcache.config.recipe import load_recipe
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe

SIDE, NUM_CLASSES = 8, 3
TEACHER: dict[str, Any] = {
    "model": {"kind": "custom", "factory": "tests.stage_one.synthesized:network"},
    "preprocessing": {"mean": [0.4], "std": [0.25]},
}
PREPROCESSING = Preprocessing(mean=(0.4,), std=(0.25,))


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grey images [n, 1, 8, 8] of 0 to 1 with labels: bright at the left, in the middle or at the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    columns = torch.arange(SIDE) // 3
    bright = (columns[None] == labels[:, None]).float()[:, None, None]
    return (0.3 * torch.rand(count, 1, SIDE, SIDE, generator=generator) + 0.6 * bright).clamp(0, 1), labels


def network(width: int = 4, steps: int = 60, seed: int = 0) -> nn.Sequential:
    """Return a network that was trained on such images; the same in every process."""
    return copy.deepcopy(_trained(width, steps, seed))


@functools.cache
def _trained(width: int, steps: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, NUM_CLASSES),
        )
        optimizer = torch.optim.Adam(made.parameters(), 0.02)
        for step in range(steps):
            pixels, labels = images(24, step)
            loss = nn.functional.cross_entropy(made((pixels - 0.4) / 0.25), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return made.eval().requires_grad_(False)


def learner() -> nn.Sequential:
    """A student that has learned little."""
    return network(2, 3, 1)


def synthesis(**changes: Any) -> SynthesizeRecipe:
    """Four batches of six images."""
    entries = {
        "teacher": TEACHER,
        "size": SIDE,
        "channels": 1,
        "num_batches": 4,
        "batch_size": 6,
        "steps": 8,
        "jitter": 1,
        "device": "cpu",
    }
    return load_recipe(entries | changes, SynthesizeRecipe)
