"""Does a smaller encoding error buy accuracy? Students of one teacher's logits in several encodings, at equal steps.

    python benchmarks/encoding_accuracy.py --root ROOT [--temperature T] [--out DIR] [--seeds N] [--part i/n]
    python benchmarks/encoding_accuracy.py --quick [--json]

Encodings differ where there are many classes, so the images are pairs: two of Fashion-MNIST, one in the red channel and
one in the green, whose class is one of 100, that of the first and that of the second. A `small_cnn` of width 32 learns
the labels of 20,000 pairs; its logits for six views of 10,000 other pairs are kept in float32, and `derive` encodes
them again for each row of the table:

    dense        float32, as the teacher answered
    uint8        255 steps a row
    transform-S  coefficients rounded to the step S; 0.8 is the default
    top-K        the K most probable classes, and the mass, mean and variance of the rest; top-100 is all of them

Students minimise KL divergence alone at the temperature, 1 by default, and see no labels. Students of a seed begin
alike and take the same steps on the same views; the difference is the top-1, on 5,000 pairs of test images, of a row
less that of `dense`, paired by seed: mean, deviation and the 95 % interval of the mean (t distribution). With the table
come the bytes and the KL divergence of each encoding, from its cache. ROOT holds the full Fashion-MNIST as torchvision
keeps it, in FashionMNIST/raw/; without it, pairs are of the bundled images.

Every student is a run in DIR, by default runs/encoding_accuracy: the same command continues and trains nothing twice.
`--part 1/2` and `--part 2/2` in two processes share the students; the command without it then prints the table.
`--quick` is few pairs, one epoch and one seed, which shows that everything runs, and no more. There is no goal.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study import chosen_rows, fashion_mnist, fashion_student, fill, run_study, study_parser, top1_of
from _training import custom
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from logitcache.config.recipe import load_recipe
from logitcache.report.inspect import inspect_cache
from logitcache.runtime.console import silenced
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.student.training import train
from logitcache.student.training_recipes import TeacherRecipe
from logitcache.views.datasets import Dataset

CLASSES = 10
QUICK = {"seeds": 1, "epochs": 1, "width": 4, "pairs": 600, "rows": "dense,transform-0.8,top-10"}
TEACHER = {"width": 32, "epochs": 6}
NUM_VIEWS = 6
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
BASELINE = "dense"
ENCODINGS: dict[str, dict[str, Any]] = {
    BASELINE: {"kind": "dense", "dtype": "float32"},
    "uint8": {"kind": "uint8"},
    **{f"transform-{step:g}": {"kind": "transform", "step": step} for step in (0.4, 0.8, 3.2)},
    **{f"top-{k}": {"kind": "top_k", "k": k} for k in (1, 3, 10, 100)},
}


@functools.cache
def singles(split: str, root: str | None) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the images [N, 28, 28] and labels [N] that pairs are made of, which are read once."""
    source = TypeAdapter(Dataset).validate_python(fashion_mnist(split, root)).open()
    pixels = torch.stack([source.read(index) for index in range(len(source.ids))])[:, 0]
    return pixels, np.asarray(source.labels)


class Pairs:
    """A factory: images [3, 28, 28] of two, the third channel empty, drawn by a seed; label 10 · first + second."""

    num_classes = CLASSES**2

    def __init__(self, split: str, root: str | None, count: int, seed: int) -> None:
        pixels, single = singles(split, root)
        drawn = np.random.default_rng(seed).integers(len(single), size=(count, 2))
        labels = single[drawn]
        self.labels = CLASSES * labels[:, 0] + labels[:, 1]
        self.images = torch.nn.functional.pad(pixels[drawn], (0, 0, 0, 0, 0, 1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def pairs(arguments: argparse.Namespace, split: str, count: int, seed: int) -> dict[str, Any]:
    """Return the recipe entry of so many pairs."""
    return custom("encoding_accuracy:Pairs", split=split, root=arguments.root, count=count, seed=seed)


def teacher(arguments: argparse.Namespace) -> str:
    """Train the teacher, unless it is there; return its run."""
    out = str(arguments.out / "teacher")
    entries = {
        "out": out,
        "model": {"kind": "small_cnn", "width": TEACHER["width"]},
        "dataset": pairs(arguments, "train", 2 * arguments.pairs, 0),
        "augmentations": AUGMENTATIONS,
        "epochs": TEACHER["epochs"],
        "batch_size": 128,
        "optimizer": {"kind": "adamw", "lr": 0.004},
        "schedule": {"warmup_epochs": 1},
        "num_workers": 0,
    }
    with silenced():
        train(load_recipe(entries, TeacherRecipe), resume=True)
    return out


def path_of(arguments: argparse.Namespace, row: str) -> str:
    """Return the path of the cache of an encoding."""
    return str(arguments.out / f"{row}.zarr")


def fill_cache(arguments: argparse.Namespace, row: str) -> None:
    """Fill the cache of an encoding, derived from that of the teacher's own logits."""
    images = pairs(arguments, "train", arguments.pairs, 1)
    source = path_of(arguments, BASELINE)
    views = {"num_views": NUM_VIEWS, "augmentations": AUGMENTATIONS}
    model = {"kind": "run", "path": teacher(arguments)}
    teachers = {"teacher": {"model": model, "logits": ENCODINGS[BASELINE]}}
    entries = {"cache": source, "dataset": images, "views": views, "teachers": teachers, "num_workers": 0}
    fill(load_recipe(entries, PrecomputeRecipe))
    if row != BASELINE:
        encoded = {"teacher": {"logits": ENCODINGS[row]}}
        derived = {"cache": source, "out": path_of(arguments, row), "teachers": encoded}
        derive(load_recipe(derived, DeriveRecipe), wait=True)


def cost_of(cache: str, temperature: float) -> dict[str, float]:
    """Return the bytes of a row of logits and the mean KL divergence, 0 if the cache loses nothing."""
    entry = inspect_cache(Path(cache))["teachers"]["teacher"]
    errors = {one["temperature"]: one["mean"] for one in entry["errors"]}
    return {"bytes": entry["bytes_per_row"], "kl": errors[temperature] if errors else 0.0}


def train_student(costs: dict[str, dict[str, float]], arguments: argparse.Namespace, row: str, seed: int) -> float:
    """Train the student of an encoding; return its top-1, and note what the encoding costs."""
    cache = path_of(arguments, row)
    if row not in costs:
        fill_cache(arguments, row)
        costs[row] = cost_of(cache, arguments.temperature)
    test = pairs(arguments, "test", arguments.pairs // 2, 2)
    more = {
        "out": str(arguments.out / f"{arguments.temperature:g}" / str(seed) / row),
        "dataset": pairs(arguments, "train", arguments.pairs, 1),
        "losses": [{"kind": "kl_divergence", "temperature": arguments.temperature}],
        "epochs": arguments.epochs,
        "batch_size": 128,
        "schedule": {"warmup_epochs": arguments.epochs / 8},
        "validation": {"dataset": test, "every": arguments.epochs},
    }
    return top1_of(fashion_student(arguments, row, seed, cache, **more))


def main() -> int:
    """Train what is not yet trained, and print the table."""
    parser = study_parser(__doc__, "runs/encoding_accuracy")
    parser.add_argument("--temperature", type=float, choices=(1.0, 4.0), default=1.0, help="of the loss")
    parser.add_argument("--width", type=int, default=8, help="of the student; the teacher has 32")
    parser.add_argument("--epochs", type=int, default=6)
    parser.set_defaults(pairs=10_000)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.rows = chosen_rows(parser, arguments.rows, list(ENCODINGS))
    costs: dict[str, dict[str, float]] = {}
    shared = {name: getattr(arguments, name) for name in ("temperature", "width", "epochs", "pairs", "seeds")}
    return run_study(arguments, functools.partial(train_student, costs), BASELINE, **shared, encodings=costs)


if __name__ == "__main__":
    sys.exit(main())
