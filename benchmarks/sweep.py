"""What do n students on one stream cost, against n separate runs?

    python benchmarks/sweep.py [--quick] [--json] [--folder DIR]

With r the time to render a batch and s that of a student's step, n students on one stream should take
(r + n s) / (n (r + s)) of the CPU time of n separate runs, and by the clock, with w workers of one thread,
max(r/w, n s, (r + n s) / cores) / (n max(r/w, s, (r + s) / cores)). A figure is the measured ratio over that formula,
goal 1.10 by CPU time and 1.15 by the clock; the note has the ratio itself, and s / r. Times are those of a batch in an
epoch, from the first to arrive on; medians over rounds, in which a group of n and a run alone, which counts n times,
take turns. r is that of rendering alone, s what a run takes beyond it.

Images: 32 px in memory, PNG files of 32 px, and JPEG files of 500 x 375 px cropped to 224, all from the photographs of
scikit-learn. `quarter`: students of s = r / 4, of which eight may take 0.35 of the CPU time. `weights`: students of a
group whose weights differ by a byte from those of separate runs. `memory`: by how much a student raises the peak of the
process, over four times its own weights: these, gradients and AdamW's moments. By the clock figures mean nothing on a
busy machine; --quick leaves out the clock, 2 and 32 students, half of the images and some rounds. Exits 1
when a goal is missed.
"""

import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _harness import Row, parser_of, run_benchmark
from _training import Arrivals, Clock, custom
from PIL import Image
from render import CROP, FLIP, TileImages, tiles, write_photos
from torch import nn

from logitcache.config.recipe import load_recipe
from logitcache.models import Classifier, Preprocessing
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train, train_together
from logitcache.student.training_data import open_training_data
from logitcache.student.training_recipes import StudentRecipe

os.environ["LOGITCACHE_SHARED_MEMORY"] = "0"
"""Files are decoded anew in every run: an epoch is too short for what processes share."""
CLASSES, CORES = 10, len(os.sched_getaffinity(0))
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
PADDED = [{"kind": "random_crop", "size": 32, "padding": 4}, FLIP]
SMALL_CNN = {"kind": "small_cnn", "width": 8}


def in_memory(count: int) -> TileImages:
    """A factory: so many images of 32 px, at most 1024."""
    return TileImages(tiles().repeat(4, 1, 1, 1)[:count])


def student(layers: int, width: int = 256) -> nn.Module:
    """A factory: a student whose step takes longer the more layers it has."""
    hidden = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
    pool = (nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, width), nn.ReLU())
    return nn.Sequential(*pool, *hidden, nn.Linear(width, CLASSES))


def teacher() -> Classifier:
    """Return a teacher that costs next to nothing."""
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, CLASSES))
    return Classifier(layers, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))


def photos(folder: Path, alike: int) -> dict[str, Any]:
    """Write 24 JPEG files, each so often."""
    (folder / "class").mkdir(parents=True)
    for path, number in itertools.product(write_photos(folder / "class"), range(alike - 1)):
        os.link(path, path.with_name(f"{path.stem}-{number}.jpg"))
    return {"kind": "image_folder", "root": str(folder), "labelled": False}


def tile_files(folder: Path, count: int) -> dict[str, Any]:
    """Write so many PNG files of 32 px."""
    (folder / "class").mkdir(parents=True)
    for number, tile in enumerate(in_memory(count).images):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / "class" / f"{number:04}.png")
    return {"kind": "image_folder", "root": str(folder), "labelled": False}


class Bench:
    """Students of one epoch on the cache of some images."""

    def __init__(self, name: str, dataset: dict[str, Any], augmentations: Any, batch_size: int, folder: Path) -> None:
        self.name, self._batch_size, self._folder = name, batch_size, folder
        self._cache = str(folder / f"{name}.zarr")
        entries = {
            "cache": self._cache,
            "dataset": dataset,
            "views": {"augmentations": augmentations},
            "teachers": {"teacher": {"preprocessing": HALF}},
            "num_workers": 0,
            "device": "cpu",
        }
        precompute(load_recipe(entries, PrecomputeRecipe), teachers={"teacher": teacher()})
        self._dataset = dataset

    def recipes(self, count: int, model: dict[str, Any], num_workers: int = 0) -> list[StudentRecipe]:
        """Return students that differ by temperature, at three of them."""
        base = {"cache": self._cache, "dataset": self._dataset, "model": model, "epochs": 1, "device": "cpu"}
        base |= {"batch_size": self._batch_size, "drop_last": True, "num_workers": num_workers, "start_method": "fork"}
        return [
            load_recipe(
                base
                | {"out": tempfile.mkdtemp(dir=self._folder) + "/run"}
                | {"losses": [{"kind": "kl_divergence", "temperature": 1 + number % 3}]},
                StudentRecipe,
            )
            for number in range(count)
        ]

    def step(self, count: int, model: dict[str, Any], clock: Clock = time.process_time, num_workers: int = 0) -> float:
        """Return the seconds from one batch to the next of so many students together."""
        arrivals = Arrivals(clock)
        train_together(self.recipes(count, model, num_workers), arrivals)
        return arrivals.seconds

    def rendering(self, clock: Clock = time.process_time) -> float:
        """Return the seconds in which a batch is rendered, in this process."""
        (recipe,) = self.recipes(1, SMALL_CNN)
        arrivals = Arrivals(clock)
        for batch in open_training_data(recipe).stream([recipe]).batches(torch.device("cpu"), 0):
            arrivals.shared(batch, 0, 0.0)
        return arrivals.seconds

    def measured(self, count: int, model: dict[str, Any], rounds: int, **options: Any) -> tuple[float, float, float]:
        """Return the ratio of times, r and s: medians over rounds in which both take turns."""
        ratios, renderings, alone = [], [], []
        for number in range(rounds):
            turns: list[tuple[int, list[float]]] = [(count, []), (1, [])]
            for students, found in turns[:: 1 if number % 2 else -1]:
                found.append(self.step(students, model, **options))
            (together,), (one,) = turns[0][1], turns[1][1]
            ratios.append(together / (count * one))
            alone.append(one)
            renderings.append(self.rendering())
        r = statistics.median(renderings)
        return statistics.median(ratios), r, max(statistics.median(alone) - r, 0.0)


def cpu_rows(bench: Bench, model: dict[str, Any], quick: bool) -> Iterator[Row]:
    """Compare CPU times."""
    for count in (8,) if quick else (2, 8, 32):
        ratio, r, s = bench.measured(count, model, 2 if quick else 5)
        formula = (r + count * s) / (count * (r + s))
        note = f"ratio {ratio:.2f}, s / r {s / r:.2f}"
        yield Row(f"{bench.name}, {count} students, CPU", ratio / formula, 1.10, at_most=True, note=note)


def clock_rows(bench: Bench, model: dict[str, Any]) -> Iterator[Row]:
    """Compare times by the clock, with a worker that renders ahead."""
    _, r, s = bench.measured(2, model, 3)
    for count in (2, 8, 32):
        ratio, *_ = bench.measured(count, model, 3, clock=time.perf_counter, num_workers=1)
        formula = max(r, count * s, (r + count * s) / CORES) / (count * max(r, s, (r + s) / CORES))
        case = f"{bench.name}, {count} students, clock, 1 worker"
        yield Row(case, ratio / formula, 1.15, at_most=True, note=f"ratio {ratio:.2f}")


def quarter(bench: Bench, quick: bool) -> Row:
    """Compare eight students whose step takes a quarter of rendering."""
    layers = 1
    for _ in range(2 if quick else 3):  # to the number of layers that takes as long; the first time warms up
        few, many = (bench.step(1, custom("sweep:student", layers=count)) - bench.rendering() for count in (1, 33))
        layers = max(0, 1 + round((bench.rendering() / 4 - few) / max((many - few) / 32, 1e-6)))
    ratio, r, s = bench.measured(8, custom("sweep:student", layers=layers), 2 if quick else 5)
    return Row(f"{bench.name}, 8 students, quarter", ratio, 0.35, at_most=True, note=f"s / r {s / r:.2f}")


def weights(bench: Bench) -> Row:
    """Compare weights of a group with those of separate runs."""
    together, alone = (bench.recipes(3, SMALL_CNN) for _ in range(2))
    train_together(together, Arrivals(time.perf_counter))
    for recipe in alone:
        train(recipe)
    pairs = zip(together, alone, strict=True)
    files = [[Path(recipe.out, "weights.safetensors").read_bytes() for recipe in pair] for pair in pairs]
    return Row(f"{bench.name}, weights that differ", sum(a != b for a, b in files), 0, "", at_most=True)


def memory(bench: Bench, quick: bool) -> Row:
    """Compare what further students add to the peak of a process with four times their weights."""
    model = custom("sweep:student", layers=12, width=1024)
    size = sum(parameter.numel() * 4 for parameter in student(12, 1024).parameters())
    counts = (1, 3) if quick else (2, 6)
    few, many = (_peak(lambda count=count: bench.step(count, model)) for count in counts)  # type: ignore[misc]
    note = f"{size / 1e6:.0f} MB of weights each"
    return Row(
        f"{bench.name}, memory of a student",
        (many - few) / (counts[1] - counts[0]) / (4 * size),
        1.25,
        at_most=True,
        note=note,
    )


def _peak(work: Callable[[], object]) -> int:
    """Return the peak of a forked process, in bytes."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, "see above"
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    count = 512 if quick else 1024
    few = Bench("192 images of 32 px", custom("sweep:in_memory", count=192), PADDED, 64, folder)
    in_ram = Bench("32 px in memory", custom("sweep:in_memory", count=count), PADDED, 64, folder)
    files = Bench("32 px files", tile_files(folder / "files", count), PADDED, 64, folder)
    jpeg = Bench("224 px JPEG", photos(folder / "photos", 3 if quick else 8), [CROP, FLIP], 16, folder)
    models = {in_ram: SMALL_CNN, files: SMALL_CNN, jpeg: custom("sweep:student", layers=8)}
    yield memory(few, quick)
    yield weights(few)
    for bench, model in models.items():
        yield from cpu_rows(bench, model, quick)
    yield quarter(jpeg, quick)
    if not quick:
        for bench, model in models.items():
            yield from clock_rows(bench, model)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(run_benchmark(parser_of(__doc__, "less of it, in a minute", "where to write"), rows, 44))
