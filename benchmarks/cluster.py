"""What does a second worker save?

    python benchmarks/cluster.py [--quick] [--json] [--folder DIR]

`precompute` with a ResNet-18 of one thread on images of 64 x 64, by one worker and by two on the cores of
this machine, against `precompute` in one process. By the clock, from the call to the finished cache: preparing it, and
opening images and teacher in every worker, count; starting the workers' processes does not. Exits 1 when a goal is
missed.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Row, parser_of, run_benchmark, seconds
from numpy.typing import NDArray
from torch import nn
from torchvision.models import resnet18

from logitcache.config.recipe import load_recipe
from logitcache.stage_one.cluster.workers import local_cluster
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

SHARD_ROWS = 256
NORMALISED = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
AUGMENTATIONS = [{"kind": "random_crop", "size": 64, "padding": 4}, {"kind": "horizontal_flip"}]


class Images:
    """Random pixels in memory, the same in every process."""

    def __init__(self, count: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Return uint8 [64, 64, 3]."""
        image: NDArray[np.uint8] = self.pixels[index]
        return image


def teacher() -> nn.Module:
    """Build a teacher that is the same in every process, where it has one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return resnet18(num_classes=1000)


def recipe(cache: Path, num_images: int) -> PrecomputeRecipe:
    """Return the recipe that all of them follow."""
    entry: dict[str, Any] = {
        "model": {"kind": "custom", "factory": "cluster:teacher"},
        "preprocessing": NORMALISED,
        "logits": {"kind": "top_k", "k": 10, "storage": "packed"},
    }
    plan = {
        "cache": str(cache),
        "dataset": {"kind": "custom", "factory": "cluster:Images", "arguments": {"count": num_images}},
        "views": {"augmentations": AUGMENTATIONS},
        "teachers": {"t": entry},
        "batch_size": 32,
        "num_workers": 0,
        "shard_rows": SHARD_ROWS,
        "device": "cpu",
    }
    return load_recipe(plan, PrecomputeRecipe)


def alone(folder: Path, num_images: int) -> float:
    """Return the seconds of a single process."""
    return seconds(lambda: precompute(recipe(folder / "alone.zarr", num_images)), time.perf_counter)


def shared(folder: Path, num_images: int, workers: int) -> float:
    """Return the seconds of some workers."""
    with local_cluster(workers, torch.device("cpu"), time.sleep) as running:
        started = time.perf_counter()
        precompute(recipe(folder / f"{workers}.zarr", num_images), scheduler=running.address)
        return time.perf_counter() - started


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure all three."""
    num_images = SHARD_ROWS * (16 if quick else 48)
    single, one, two = alone(folder, num_images), shared(folder, num_images, 1), shared(folder, num_images, 2)
    note = f"{num_images / two:.0f} images/s by two, {num_images / one:.0f} by one"
    yield Row("two workers, of one worker's time", two / one, 0.6, at_most=True, note=note)
    yield Row("one worker, of a process's time", one / single, 1.15, at_most=True, note=f"{single:.1f} s alone")


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(
        parser_of(__doc__, "fewer images", "where to put a few MB of temporary files"), rows_of, 36, None
    )


if __name__ == "__main__":
    sys.exit(main())
