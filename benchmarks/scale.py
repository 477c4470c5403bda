"""Does a row-view cost what `plan`'s model says, whatever their number?

    python benchmarks/scale.py [--quick] [--json] [--folder DIR]

`precompute` with a teacher that costs next to nothing, on tiny images in memory, two views of each: 10^4 and 10^5
row-views, and 10^6 without --quick. Bytes, files and CPU time against those that the model predicts by a probe at 10^4
row-views, and CPU time by row-view against that of 10^4. Time is that of all cores from the first batch of the loop to
the end; each size counts by its fastest round, as what others do on the machine only adds to it. Exits 1 when a goal is
missed. docs/explanation/scale.md says what follows for large caches, scale_metadata.py simulates them.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _harness import Row, parser_of, run_benchmark
from memory import Names
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.config.recipe import load_recipe
from logitcache.planning.costs import StoreCost, skeleton_sizes, store_cost
from logitcache.planning.dry_run import dry_run
from logitcache.planning.probe import probe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.views.canaries import NUM_CANARIES

NUM_CLASSES, NUM_VIEWS, BATCH, SIDE = 1000, 2, 256, 8
TOP10 = {"kind": "packed_top_k", "k": 10}
WITHIN = 10.0
"""Percent that a figure may be off."""

PROBES = 2
QUICK, FULL = {10**4: 3, 10**5: 1}, {10**4: 10, 10**5: 4, 10**6: 2}
"""Rounds by row-views."""


class TinyImages:
    """Images that are cut out of one block of noise, each from another place."""

    num_classes = None
    class_names = None

    def __init__(self, count: int) -> None:
        self.ids = Names(count)
        self.labels = np.full(count, -1, np.int64)
        self._noise = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def read(self, index: int) -> Tensor:
        """Return uint8 [1, SIDE, SIDE]."""
        start = index * 40_503 % (len(self._noise) - SIDE * SIDE)
        return self._noise[start : start + SIDE * SIDE].view(1, SIDE, SIDE)

    def sizes(self) -> NDArray[np.int64]:
        """Return heights and widths: all the same, one row in memory."""
        return np.broadcast_to(np.array([SIDE, SIDE]), (len(self.ids), 2))

    def digests(self) -> NDArray[np.uint64]:
        """Return one number per image."""
        return np.arange(len(self.ids), dtype=np.uint64)


class Fake(nn.Module):
    """A linear teacher, confident as real ones are, that notes the CPU time at the first batch of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SIDE * SIDE, NUM_CLASSES)
        nn.init.normal_(self.head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
        self.began: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Answer."""
        if self.began is None and len(images) > NUM_CANARIES:
            self.began = time.process_time()
        answers: Tensor = self.head(images.flatten(1))
        return answers


def recipe_of(cache: Path) -> PrecomputeRecipe:
    """Return the recipe of all runs."""
    augmentations = [{"kind": "random_crop", "size": SIDE, "padding": 1}, {"kind": "horizontal_flip"}]
    recipe = {
        "cache": str(cache),
        "views": {"num_views": NUM_VIEWS, "augmentations": augmentations},
        "teachers": {"t": {"preprocessing": {"mean": [0.5], "std": [0.25]}, "logits": TOP10}},
        "batch_size": BATCH,
        "num_workers": 0,
        "device": "cpu",
    }
    return load_recipe(recipe, PrecomputeRecipe)


class Run(NamedTuple):
    """What a run left and took: seconds of CPU by row-view, from the first batch to the last commit."""

    bytes: int
    files: int
    seconds: float


def run(folder: Path, num_rows: int) -> Run:
    """Precompute so many row-views."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        cache, teacher = Path(name, "c.zarr"), Fake()
        done = precompute(recipe_of(cache), teachers={"t": teacher}, dataset=TinyImages(num_rows // NUM_VIEWS))
        assert teacher.began is not None
        seconds = (time.process_time() - teacher.began) / num_rows
        return Run(done.bytes, sum(file.is_file() for file in cache.rglob("*")), seconds)


class Model:
    """What plan's model predicts, by a probe at few rows."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder = folder
        with dry_run(
            recipe_of(folder / "none"), teachers={"t": Fake()}, dataset=TinyImages(num_rows // NUM_VIEWS)
        ) as it:
            found = [probe(it) for _ in range(PROBES)]
        self.seconds, self._packed = min(one.cores for one in found), found[0].packed

    def store(self, num_rows: int) -> StoreCost:
        """Return what is stored of so many rows."""
        images = TinyImages(num_rows // NUM_VIEWS)
        with dry_run(recipe_of(self._folder / "none"), teachers={"t": Fake()}, dataset=images) as run:
            return store_cost(run.todo.layout, self._packed, skeleton_sizes(run.todo.goal))


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    return run_rows(folder, QUICK if quick else FULL)


def run_rows(folder: Path, sizes: dict[int, int]) -> Iterator[Row]:
    """Compare runs of so many rows, each in so many rounds, with the model."""
    model, few = Model(folder, min(sizes)), min(sizes)
    every: dict[int, list[Run]] = {size: [] for size in sizes}
    for number in range(max(sizes.values())):
        for size, rounds in sizes.items():
            every[size] += [run(folder, size)] if number < rounds else []
    seconds = {size: min(one.seconds for one in runs) for size, runs in every.items()}
    for size, runs in every.items():
        store, name = model.store(size), f"run of {size:>9,} rows"
        note = f"{runs[0].bytes / size:.1f} bytes a row"
        yield Row(f"{name}: bytes off", off(runs[0].bytes, store.bytes), WITHIN, "%", True, note)
        yield Row(f"{name}: files off", abs(runs[0].files - store.files), 0, "", True, f"{store.files} files")
        note = f"{1e6 * seconds[size]:.1f} us a row, predicted {1e6 * model.seconds:.1f}"
        yield Row(f"{name}: CPU time off", off(seconds[size], model.seconds), WITHIN, "%", True, note)
        if size != few:
            yield Row(f"{name}: not flat, by", off(seconds[size], seconds[few]), WITHIN, "%", True, f"against {few:,}")


def off(measured: float, wanted: float) -> float:
    """Return by how many percent a figure is off."""
    return 100 * abs(measured / wanted - 1)


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(
        parser_of(__doc__, "fewer rows, fewer rounds", "where to put up to 50 MB of temporary files"), rows_of, 52
    )


if __name__ == "__main__":
    sys.exit(main())
