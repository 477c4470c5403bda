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

The difference is the top-1 of a row less that of `epochs`, paired by seed: mean, deviation, and the 95 % interval of
the mean (t distribution). Each seed has views and initial weights of its own. ROOT holds the full Fashion-MNIST as
torchvision keeps it, in FashionMNIST/raw/: its 60,000 images are learned from with `--full`, else the 5,000 bundled
ones; students are tested on its 10,000 test images, or on the 2,000 bundled ones without ROOT. `--width` is that of the
student; the teacher has 32.

Every student is a run in DIR, by default runs/views: the same command continues and trains nothing twice. `--part 1/2`
and `--part 2/2` in two processes share the students; the command without it then prints the table. `--quick` is two
epochs of one seed, which shows that everything runs, and no more. There is no goal: the table is the result.
"""

import argparse
import math
import sys

from _study import chosen_rows, fashion_cache, fashion_mnist, fashion_student, run_study, study_parser, top1_of

QUICK = {"seeds": 1, "epochs": 2, "width": 4}
AUGMENTATIONS = [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}]
BASELINE = "epochs"


def row_names(epochs: int) -> list[str]:
    """List the rows: powers of two below the epochs between the ends."""
    counts = [2**power for power in range(math.ceil(math.log2(epochs)))]
    return ["labels", "plain", *map(str, counts), BASELINE, "online"]


def train_student(arguments: argparse.Namespace, row: str, seed: int) -> float:
    """Train the student of a row; return its top-1. A cache is of a seed, or the one of a plain view."""
    epochs, is_plain = arguments.epochs, row == "plain"
    path = arguments.out / ("plain" if is_plain else str(seed)) / "cache.zarr"
    augmented = {"num_views": epochs, "seed": seed, "augmentations": AUGMENTATIONS, "mixing": [{"kind": "mixup"}]}
    images = fashion_mnist("train", arguments.root if arguments.full else None)
    cache = fashion_cache(path, images, {"num_views": 1} if is_plain else augmented)
    num_views = int(row) if row.isdecimal() else 1 if is_plain else epochs
    more = {"epochs": epochs, "num_views": num_views, "batch_size": 128, "schedule": {"warmup_epochs": 1.0}}
    return top1_of(fashion_student(arguments, row, seed, cache, **more), online=row == "online")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(__doc__, "runs/views")
    parser.add_argument("--full", action="store_true", help="learn from the 60,000 images in ROOT")
    parser.add_argument("--width", type=int, default=8, help="of the student; the teacher has 32")
    parser.add_argument("--epochs", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.rows = chosen_rows(parser, arguments.rows, row_names(arguments.epochs))
    if arguments.full and arguments.root is None:
        parser.error("--full needs --root")
    return arguments


def main() -> int:
    """Train what is not yet trained, and print the table."""
    arguments = parse()
    shared = {name: getattr(arguments, name) for name in ("full", "width", "epochs", "seeds")}
    return run_study(arguments, train_student, BASELINE, **shared)


if __name__ == "__main__":
    sys.exit(main())
