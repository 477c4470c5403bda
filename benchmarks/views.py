"""How many cached views are enough? Accuracy of students by the number of views, at equal steps.

    python benchmarks/views.py [--root ROOT] [--out DIR] [--width W] [--epochs N] [--seeds N] [--rows a,b] [--part i/n]
    python benchmarks/views.py --quick [--json]

Beyer et al. 2022 (arXiv:2106.05237) report that students overfit targets that are computed once. Here the teacher is
the shipped one; the views are random crops, flips and mixup; the student minimises KL divergence alone, and takes the
same number of steps in every row, on the same pixels in the same order for rows that have seen the same views:

    labels   cross-entropy on the mixed labels, a new view each epoch: no teacher
    plain    one view without augmentation: one target for each image
    1, 2, …  so many cached views, which the epochs take in turn
    epochs   as many cached views as epochs: each epoch has a view of its own, as online
    online   the same, with the teacher in the loop

`less` is the top-1 of `epochs` less that of the row, paired by seed: mean, deviation, and the half-width of the 95 %
interval of the mean (t distribution). Each seed has views and initial weights of its own. ROOT holds the full
Fashion-MNIST as torchvision keeps it, in FashionMNIST/raw/: its 60,000 images are learned from with `--full`, else the
5,000 bundled ones; students are tested on its 10,000 test images, or on the 2,000 bundled ones without ROOT. `--width`
is that of the student; the teacher has 32.

Every student is a run in DIR, by default runs/views: the same command continues and trains nothing twice. `--part 1/2`
and `--part 2/2` in two processes share the students; the command without it then prints the table. `--quick` is two
epochs of one seed, which shows that everything runs, and no more. There is no goal: the table is the result.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import parser_of, print_json
from scipy.stats import t as student_t

from logitcache.config.recipe import load_recipe
from logitcache.errors import LogitCacheError
from logitcache.runtime.console import configure, logger, silenced
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.teacher.online import live_targets

QUICK = {"seeds": 1, "epochs": 2, "width": 4}
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
WAIT = 5.0
"""Seconds between looks at shards that another process writes."""


def images_of(split: str, root: str | None) -> dict[str, Any]:
    """Return the recipe entry of images: the full set in `root`, or the bundled ones."""
    if root is None:
        return {"kind": "bundled", "split": split}
    return {"kind": "torchvision", "name": "FashionMNIST", "root": root, "split": split, "mode": "L"}


def row_names(epochs: int) -> list[str]:
    """List the rows: powers of two below the epochs between the ends."""
    counts = [2**power for power in range(math.ceil(math.log2(epochs)))]
    return ["labels", "plain", *map(str, counts), "epochs", "online"]


def fill_cache(arguments: argparse.Namespace, seed: int, plain: bool) -> Path:
    """Fill the cache of a seed, or wait until the process that fills it has done so."""
    path: Path = arguments.out / ("plain" if plain else str(seed)) / "cache.zarr"
    views = {"num_views": arguments.epochs, "seed": seed, "augmentations": AUGMENTATIONS, "mixing": [{"kind": "mixup"}]}
    entry = {
        "cache": str(path),
        "dataset": images_of("train", arguments.root if arguments.full else None),
        "views": {"num_views": 1} if plain else views,
        "teachers": {"teacher": {"model": {"kind": "bundled"}, "logits": {"kind": "dense"}}},
        "num_workers": 0,
    }
    while precompute(load_recipe(entry, PrecomputeRecipe)).shards_left:
        time.sleep(WAIT)
    return path


def train_student(arguments: argparse.Namespace, row: str, seed: int) -> float:
    """Train a student, or read what it measured; returns its top-1 after the last epoch, in percent."""
    cache = fill_cache(arguments, seed, row == "plain")
    epochs = arguments.epochs
    entry = {
        "out": str(arguments.out / str(seed) / row),
        "cache": str(cache),
        "model": {"kind": "small_cnn", "width": arguments.width},
        "losses": [{"kind": "cross_entropy" if row == "labels" else "kl_divergence"}],
        "optimizer": {"kind": "adamw", "lr": 0.004},
        "schedule": {"warmup_epochs": 1.0},
        "epochs": epochs,
        "num_views": {"plain": 1, "labels": epochs, "epochs": epochs, "online": epochs}.get(row) or int(row),
        "batch_size": 128,
        "seed": seed,
        "num_workers": 0,
        "validation": {"dataset": images_of("test", arguments.root), "every": epochs},
    }
    recipe = load_recipe(entry, StudentRecipe)
    with silenced():
        live = live_targets(recipe.cache, recipe.device) if row == "online" else None
        top1 = train(recipe, resume=True, live=live).top1
    assert top1 is not None, "the test images have labels"
    return 100 * top1


def tabulate(found: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Average each row, and its difference to the row `epochs`, over seeds."""
    best, rows = found.get("epochs", {}), []
    for name, tops in found.items():
        less = [best[seed] - top for seed, top in tops.items() if seed in best and name != "epochs"]
        rows.append({"views": name, "seeds": sorted(tops), "top1": _spread([*tops.values()]), "less": _spread(less)})
    return rows


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    count, deviation = len(values), statistics.stdev(values) if len(values) > 1 else math.nan
    half = float(student_t.ppf(0.975, count - 1)) * deviation / math.sqrt(count) if count > 1 else math.nan
    figures = {"mean": statistics.mean(values), "std": deviation, "interval": half}
    return {name: round(value, 2) for name, value in figures.items() if not math.isnan(value)}


def _written(values: dict[str, float] | None) -> str:
    if values is None:
        return ""
    if "std" not in values:
        return f"{values['mean']:.2f}"
    return f"{values['mean']:.2f} ± {values['std']:.2f} (± {values['interval']:.2f})"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, "two epochs of one seed")
    parser.add_argument("--root", help="folder of torchvision's data sets; by default the bundled test images")
    parser.add_argument("--full", action="store_true", help="learn from the 60,000 images in ROOT")
    parser.add_argument("--out", type=Path, help="folder of caches and runs; of --quick a folder that is removed")
    parser.add_argument("--width", type=int, default=8, help="of the student; the teacher has 32")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", help="of the table, with commas; by default all")
    parser.add_argument("--part", default="1/1", metavar="i/n", help="each n-th student")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    names = row_names(arguments.epochs)
    arguments.rows = arguments.rows.split(",") if arguments.rows else names
    if unknown := [name for name in arguments.rows if name not in names]:
        parser.error(f"--rows {unknown} are not among {', '.join(names)}")
    if arguments.full and arguments.root is None:
        parser.error("--full needs --root")
    return arguments


def main() -> int:
    """Train what is not yet trained, and print the table."""
    arguments = parse()
    configure(quiet=arguments.json)
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary if arguments.quick else "runs/views")
        try:
            number, count = parse_part(arguments.part)
            jobs = [(row, seed) for seed in range(arguments.seeds) for row in arguments.rows]
            for row, seed in jobs[number - 1 :: count]:
                found.setdefault(row, {})[seed] = train_student(arguments, row, seed)
                logger.info(f"{row}, seed {seed}: {found[row][seed]:.2f} %")
        except LogitCacheError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    rows = tabulate(found)
    shared = {name: getattr(arguments, name) for name in ("full", "width", "epochs", "seeds")}
    if arguments.json:
        print_json(rows, conditions=shared)
    else:
        print(f"{'views':<8} {'top-1, %: mean ± deviation (interval)':<38} less than a view an epoch   n   {shared}")
        for row in rows:
            print(f"{row['views']:<8} {_written(row['top1']):<38} {_written(row['less']):<26} {len(row['seeds']):>3}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
