"""What is a student worth that never saw an image? Accuracy beside students on real images, at equal steps.

    python benchmarks/data_free.py [--root ROOT] [--out DIR] [--width W] [--steps N] [--seeds N] [--part i/n]
    python benchmarks/data_free.py --quick [--json]

All students learn from the shipped teacher's cached answers, KL divergence alone, in 4 views of random crops and flips:

    real       to the 5,000 bundled images of Fashion-MNIST
    real-few   to as many of these as are synthesized
    data-free  to images that `synthesize` made from the teacher, by the recipe of pipelines/data_free
    adaptive   to these and a batch more, on which the `data-free` student and the teacher disagree

Synthesized images and students differ by the seed; all students take as many steps of as many images. The
difference is the top-1 of a row less that of `real`, paired by seed. ROOT holds the full Fashion-MNIST as torchvision
keeps it, in FashionMNIST/raw/: students are tested on its 10,000 test images, or on the 2,000 bundled ones without
ROOT.

Images, caches and students are kept in DIR, by default runs/data_free: the same command continues and makes nothing
twice. `--part 1/2` and `--part 2/2` in two processes share the students. `--quick` is a few steps of one seed, which
shows that everything runs, and no more. There is no goal: the table is the result, whatever it says.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from _study import chosen_rows, fashion_cache, fashion_student, run_study, study_parser, top1_of

from logitcache.cache.cache import open_cache
from logitcache.config.recipe import load_recipe
from logitcache.runtime.console import logger
from logitcache.stage_one.synthesize.synthesize import synthesize
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe

PIPELINE = Path(__file__).resolve().parents[1] / "pipelines/data_free/synthesize.yaml"
ROWS = ("real", "real-few", "data-free", "adaptive")
QUICK = {"seeds": 1, "steps": 40, "width": 4, "rows": "real,data-free,adaptive", "small": True}
SMALL = ("num_batches=2", "batch_size=20", "steps=3")
BATCH = 50
VIEWS = {
    "num_views": 4,
    "augmentations": [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}],
}


def images_of(arguments: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """Return the images of a row as the entry of a recipe; synthesize those that are not there."""
    if row == "real":
        return {"kind": "bundled", **({"num_images": 200} if arguments.small else {})}
    changes = [f"seed={seed}", "device=cpu", "format=webdataset", *(SMALL if arguments.small else ())]
    recipe = load_recipe(PIPELINE, SynthesizeRecipe, changes)
    if row == "real-few":
        return {"kind": "bundled", "num_images": recipe.num_batches * recipe.batch_size}
    out = arguments.out / str(seed) / "images"
    made = synthesize(recipe, out)
    logger.info(f"seed {seed}: the teacher is right on {made.teacher_accuracy:.1%} of the images; {dict(made.losses)}")
    shards = [f"{made.images}/00-{batch:05}.tar" for batch in range(recipe.num_batches)]
    if row == "adaptive":
        train_student(arguments, "data-free", seed)
        made = synthesize(
            recipe.model_copy(update={"num_batches": 1}), out, student=arguments.out / str(seed) / "data-free"
        )
        logger.info(
            f"seed {seed}: the student agrees on {made.student_agreement:.1%} of {made.num_images} added images"
        )
        shards.append(f"{made.images}/01-00000.tar")
    return {"kind": "webdataset", "shards": shards, "mode": "L"}


def train_student(arguments: argparse.Namespace, row: str, seed: int) -> float:
    """Train the student of a row; return its top-1."""
    name = row if row.startswith("real") else f"{row}-{seed}"
    cache = fashion_cache(arguments.out / f"{name}.zarr", images_of(arguments, row, seed), VIEWS)
    epochs = max(1, arguments.steps * BATCH // len(open_cache(cache)))
    more = {"epochs": epochs, "batch_size": BATCH, "schedule": {"warmup_epochs": epochs / 20}}
    return top1_of(fashion_student(arguments, row, seed, cache, **more))


def main() -> int:
    """Train what is not yet trained, and print the table."""
    parser = study_parser(__doc__, "runs/data_free")
    parser.add_argument("--width", type=int, default=8, help="of the students; the teacher has 32")
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} images, of every student")
    arguments = parser.parse_args()
    arguments.small = False
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.rows = chosen_rows(parser, arguments.rows, list(ROWS))
    shared = {name: getattr(arguments, name) for name in ("width", "steps", "seeds")}
    return run_study(arguments, train_student, "real", **shared)


if __name__ == "__main__":
    sys.exit(main())
