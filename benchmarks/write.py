"""What does keeping the answers cost, next to the teacher that gives them?

    python benchmarks/write.py [--quick] [--json] [--folder DIR]

`precompute` with a ResNet-18 on images of 64 x 64 against the same teacher and loader with nothing stored, from the
first batch of the loop until the last shard is committed: with top-10 answers, and with rows of 50 KB, which is what
feature maps take. Both take turns, and each counts by its fastest round. Shards of the wide rows are small, as the run
is short: the last one is flushed when the teacher has nothing left to do. Then the writer alone: dense logits of 1000
classes, whole shards, flushed to the disk. By the clock; the teacher has one thread. Exits 1 when a goal is missed.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Row, parser_of, run_benchmark
from numpy.typing import NDArray
from read import DENSE, TOP10, made, skeleton
from torch import Tensor, nn
from torchvision.models import resnet18

from logitcache.cache.write.writer import CacheWriter
from logitcache.config.recipe import load_recipe
from logitcache.models import Classifier, Preprocessing
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.local import LocalStore
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec

BATCH = 64
"""Not the number of canaries, which the teacher sees before the loop begins."""

WIDE = 12_800
"""Classes whose float32 logits take 50 KB."""

AUGMENTATIONS = [{"kind": "random_crop", "size": 64, "padding": 4}, {"kind": "horizontal_flip"}]
NORMALISED = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Noise:
    """Images of random pixels in memory."""

    num_classes = None
    class_names = None

    def __init__(self, count: int) -> None:
        self.images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
        self.ids = [str(number) for number in range(count)]
        self.labels = np.full(count, -1, np.int64)

    def read(self, index: int) -> Tensor:
        """Return uint8 [3, 64, 64]."""
        return self.images[index]

    def sizes(self) -> NDArray[np.int64]:
        """Return heights and widths."""
        return np.full((len(self.images), 2), 64)

    def digests(self) -> NDArray[np.uint64]:
        """Return one number per image."""
        return np.arange(len(self.images), dtype=np.uint64)


class Timed(nn.Module):
    """A teacher that notes when its first whole batch comes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.started: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Answer."""
        if self.started is None and len(images) == BATCH:
            self.started = time.time()
        answers: Tensor = self.module(images)
        return answers

    def seconds(self, until: float) -> float:
        """Return the time since the first batch, and begin again."""
        assert self.started is not None
        elapsed, self.started = until - self.started, None
        return elapsed


class Case(NamedTuple):
    """What is stored."""

    name: str
    num_classes: int
    logits: dict[str, Any]
    shard_rows: int | None = None


CASES = (
    Case("precompute, top-10 of 1000", 1000, TOP10),
    Case("precompute, 50 KB a row", WIDE, {"kind": "dense", "dtype": "float32"}, shard_rows=128),
)


def stored(folder: Path, case: Case, teacher: Timed, images: Noise) -> float:
    """Precompute and return the seconds of its loop, which ends with the last record."""
    recipe = {
        "cache": str(folder / "c.zarr"),
        "views": {"augmentations": AUGMENTATIONS},
        "teachers": {"t": {"preprocessing": NORMALISED, "logits": case.logits}},
        "batch_size": BATCH,
        "shard_rows": case.shard_rows,
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers={"t": teacher}, dataset=images)
    return teacher.seconds(max(record.stat().st_mtime for record in folder.glob("c.zarr/t.logits.commits/c.*")))


def unstored(teacher: Timed, images: Noise) -> float:
    """Render and answer the same views, and keep nothing."""
    views = Views(images, ViewSpec.model_validate_json(json.dumps({"augmentations": AUGMENTATIONS})))
    classifier = Classifier(teacher, Preprocessing.model_validate_json(json.dumps(NORMALISED)))
    keys = [ViewKey(0, index) for index in range(len(images.images))]
    loader = ViewLoader(views, 0, "forkserver")
    with torch.inference_mode():
        for pixels in loader.render(keys[start : start + BATCH] for start in range(0, len(keys), BATCH)):
            classifier(pixels)
    ended = time.time()
    loader.close()
    return teacher.seconds(ended)


def precompute_row(case: Case, num_images: int, rounds: int, folder: Path) -> Row:
    """Compare both, in turns."""
    torch.manual_seed(0)
    teacher, images = Timed(resnet18(num_classes=case.num_classes).eval()), Noise(num_images)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for keep in (True, False)[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                times[keep].append(stored(Path(name), case, teacher, images) if keep else unstored(teacher, images))
    note = f"{num_images / min(times[True]):.0f} images/s"
    return Row(f"{case.name}: throughput kept", min(times[False]) / min(times[True]), 0.97, note=note)


def writer_row(num_images: int, folder: Path) -> Row:
    """Write hot shards as fast as they come."""
    path = folder / "hot.zarr"
    layout = skeleton(path, DENSE, num_images, 1)
    shards, generator = list(layout.shards()), np.random.default_rng(0)
    array, errors = layout.arrays
    values, none = made(array, array.shard_rows, generator), np.zeros((1, *errors.row_shape), errors.dtype)
    writer, started = CacheWriter(LocalStore(path), layout), time.perf_counter()
    for shard in shards:
        writer.submit(shard, {array.name: values[: shard.stop - shard.start], errors.name: none})
    writer.flush()
    rate = num_images * array.row_bytes / (time.perf_counter() - started) / 1e6
    writer.close()
    return Row("the writer alone, hot arrays", rate, 500.0, "MB/s", note=f"{len(shards)} shards of 32 MiB")


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    yield writer_row(16_384 * (24 if quick else 80), folder)
    for case in CASES:
        yield precompute_row(case, 832 if quick else 2048, 3 if quick else 5, folder)


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(parser_of(__doc__, "fewer images", "where to put up to 3 GB of temporary files"), rows_of, 46)


if __name__ == "__main__":
    sys.exit(main())
