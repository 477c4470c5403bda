"""Does `plan` tell what `precompute` then takes?

    python benchmarks/plan.py [--quick] [--json] [--folder DIR]

For each recipe `logitcache plan` and then `logitcache precompute`, in turns and each in a process of its own: how far
the bytes of the array that is furthest off, the count of files, and the seconds are from what was predicted. Time is by
the clock, and medians over the rounds are compared: on a machine that others use meanwhile it tells little. torch has
one thread in each process. Exits 1 when a goal is missed: bytes within 5 %, files exactly, time within 20 %.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from _harness import Row, parser_of, run_benchmark
from PIL import Image

CROPPED: list[dict[str, Any]] = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
RESIZED: list[dict[str, Any]] = [{"kind": "random_resized_crop", "size": 64}, {"kind": "horizontal_flip"}]
BUNDLED = {"kind": "bundled", "split": "train"}
FEATURES = {
    "block2": {"kind": "maps", "tap": "0.8", "dtype": "int8"},
    "attention": {"kind": "attention", "tap": "0.8", "storage": "packed"},
}
RESNET = {
    "model": {"kind": "torchvision", "name": "resnet18", "weights": None},
    "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3},
    "logits": {"kind": "packed_top_k", "k": 10},
}


class Case(NamedTuple):
    """What is answered and kept, and by how many processes it is rendered."""

    name: str
    dataset: dict[str, Any]
    augmentations: list[dict[str, Any]]
    teacher: dict[str, Any]
    num_workers: int
    batch_size: int = 256

    def write(self, folder: Path, num_views: int) -> Path:
        """Write its recipe, of so many views."""
        recipe = {
            "cache": str(folder / "c.zarr"),
            "dataset": self.dataset,
            "views": {"num_views": num_views, "augmentations": self.augmentations},
            "teachers": {"t": self.teacher},
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "device": "cpu",
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path


def cases(images: Path) -> list[Case]:
    """Return the cases; the last has a folder of images."""
    own = {"model": {"kind": "bundled"}}
    transform = own | {"logits": {"kind": "transform", "step": 0.25}}
    featured = own | {"logits": {"kind": "head"}, "features": FEATURES}
    folder = {"kind": "image_folder", "root": str(images), "labelled": False}
    return [
        Case("head, int8 maps, attention; no workers", BUNDLED, CROPPED, featured, 0),
        Case("transform, calibrated; 2 workers", BUNDLED, CROPPED, transform, 2),
        Case("JPEG files, ResNet-18, packed top-10; 1 worker", folder, RESIZED, RESNET, 1, 64),
    ]


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files of smooth noise, 160 x 120."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((160, 120)).save(folder / f"{number:05d}.jpg")


def document_of(command: str, recipe: Path) -> dict[str, Any]:
    """Run a command of logitcache and return its document."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(recipe.parent)}
    line = [sys.executable, "-m", "logitcache", command, str(recipe), "--json", "-q"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class Round(NamedTuple):
    """How far off a prediction was: bytes of the array that is furthest off, as a part, and files; and seconds."""

    bytes: float
    files: int
    predicted: float
    measured: float


def compare(case: Case, folder: Path, num_views: int) -> Round:
    """Plan, precompute, and compare; sums of errors by shard, a few hundred bytes, count with all bytes alone."""
    recipe = case.write(folder, num_views)
    plan, run = document_of("plan", recipe), document_of("precompute", recipe)
    cache = Path(plan["cache"])
    off = [abs(plan["bytes"] / run["bytes"] - 1)]
    for array in plan["arrays"]:
        stored = sum(file.stat().st_size for file in (cache / array["array"]).glob("c.*"))
        if not array["array"].endswith(".errors"):
            off.append(abs(array["bytes"] / stored - 1))
    files = plan["files"] - sum(path.is_file() for path in cache.rglob("*"))
    return Round(max(off), abs(files), statistics.mean(plan["seconds"]), run["seconds"])


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    images = folder / "images"
    write_images(images, 300 if quick else 3000)
    for case in cases(images)[:: 2 if quick else 1]:
        rounds = []
        for _ in range(1 if quick else 3):
            with tempfile.TemporaryDirectory(dir=folder) as name:
                rounds.append(compare(case, Path(name), 1 if quick else 8))
        predicted = statistics.median(one.predicted for one in rounds)
        measured = statistics.median(one.measured for one in rounds)
        note = f"{predicted:.1f} s predicted, {measured:.1f} s measured"
        yield Row(f"{case.name}: bytes off", 100 * max(one.bytes for one in rounds), 5.0, "%", at_most=True)
        yield Row(f"{case.name}: files off", max(one.files for one in rounds), 0, "", at_most=True)
        yield Row(f"{case.name}: time off", 100 * abs(predicted / measured - 1), 20.0, "%", at_most=True, note=note)


def main() -> int:
    """Print each figure beside its goal."""
    return run_benchmark(
        parser_of(__doc__, "two recipes, one view, one round", "where to put up to 1 GB of temporary files"),
        rows_of,
        66,
        None,
    )


if __name__ == "__main__":
    sys.exit(main())
