"""What is a cache worth where labels are few? Accuracy of students by the number of labelled images, at equal steps.

    python benchmarks/few_labels.py [--root ROOT] [--out DIR] [--width W] [--steps N] [--seeds N] [--part i/n]
    python benchmarks/few_labels.py --quick [--json]

Of the 5,000 bundled images of Fashion-MNIST some are labelled, the same number of each class:

    labels-N   cross-entropy on N labelled images: no teacher
    cache-N    KL divergence to the cached answers for the same N images, their labels unused
    unlabelled KL divergence to the cached answers for all 5,000 images, without any label

All students take as many steps of as many images, on random crops and flips in up to 32 views. The teacher is the
shipped one, which learned from all 60,000 labels: the study asks what a teacher that exists is worth to one who has few
labels of their own. The difference is the top-1 of a row less that of `labels-5000`, paired by seed. ROOT holds the
full Fashion-MNIST as torchvision keeps it, in FashionMNIST/raw/: students are tested on its 10,000 test images, or on
the 2,000 bundled ones without ROOT.

Every student is a run in DIR, by default runs/few_labels: the same command continues and trains nothing twice.
`--part 1/2` and `--part 2/2` in two processes share the students; the command without it then prints the table.
`--quick` is a few steps of one seed, which shows that everything runs, and no more. There is no goal: the table is the
result.
"""

import argparse
import sys

from _study import chosen_rows, fashion_cache, fashion_student, run_study, study_parser, top1_of

COUNTS = (100, 250, 1000, 5000)
"""Labelled images, all multiples of the ten classes."""
QUICK = {"seeds": 1, "steps": 100, "width": 4, "rows": "labels-100,cache-100,unlabelled"}
BATCH, MOST_VIEWS = 50, 32
BASELINE = f"labels-{COUNTS[-1]}"
NAMES = [f"{kind}-{count}" for count in COUNTS for kind in ("labels", "cache")]


def train_student(arguments: argparse.Namespace, row: str, seed: int) -> float:
    """Train the student of a row; return its top-1."""
    number = row.partition("-")[2]
    count = int(number) if number else COUNTS[-1]
    epochs = max(1, arguments.steps * BATCH // count)
    views = {
        "num_views": min(MOST_VIEWS, epochs),
        "seed": seed,
        "augmentations": [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}],
    }
    cache = fashion_cache(arguments.out / f"{count}-{seed}.zarr", {"kind": "bundled", "num_images": count}, views)
    more = {"epochs": epochs, "batch_size": BATCH, "schedule": {"warmup_epochs": epochs / 20}}
    return top1_of(fashion_student(arguments, row, seed, cache, **more))


def main() -> int:
    """Train what is not yet trained, and print the table."""
    parser = study_parser(__doc__, "runs/few_labels")
    parser.add_argument("--width", type=int, default=16, help="of the student; the teacher has 32")
    parser.add_argument("--steps", type=int, default=3200, help=f"of {BATCH} images, of every student")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    names = [*NAMES[:-1], "unlabelled"]  # of all images the answers are those of `unlabelled`
    arguments.rows = chosen_rows(parser, arguments.rows, names)
    shared = {name: getattr(arguments, name) for name in ("width", "steps", "seeds")}
    return run_study(arguments, train_student, BASELINE, **shared)


if __name__ == "__main__":
    sys.exit(main())
