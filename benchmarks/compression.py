"""What int8 and pruning cost in accuracy, fine-tuned from the cache and without it.

    python benchmarks/compression.py --root ROOT [--out DIR] [--seeds N] [--width W] [--epochs N] [--json]
    python benchmarks/compression.py --quick [--json]

ROOT holds the full Fashion-MNIST as torchvision keeps it, in FashionMNIST/raw/. One cache of the shipped teacher's
logits; for each seed a student of half cross-entropy, half KL divergence. From each student: int8 after training (PTQ),
training for int8 from the cache (QAT), half of the multiply-adds removed and fine-tuned from the cache by the student's
own recipe, and the same on labels alone. A figure is the student's top-1 on the 10,000 test images less that of the
smaller model, in points: mean over the seeds, its deviation in the note. Goals: 0.5 points for QAT, 1 point for pruning
from the cache. Fine-tuning doubles the epochs; the last line is the loss against a student that is trained on for as
many, unpruned.

Every model is a run in DIR, by default runs/compression: the same command continues and trains nothing twice. `--quick`
is one seed of 1,000 bundled images, which shows that everything runs, and no more. Exits 1 when a goal is missed.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _harness import Row, exit_code, parser_of, print_json

from logitcache.config.recipe import load_recipe
from logitcache.runtime.console import configure
from logitcache.shipping.prune import prune
from logitcache.shipping.quantization.quantization_aware import train_quantized
from logitcache.shipping.quantization.quantize import quantize
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe

QUICK = {"seeds": 1, "epochs": 2, "width": 8}
ON_LABELS = "losses=[{kind: cross_entropy}]"
GOALS = {
    "int8 by PTQ": None,
    "int8 by QAT": 0.5,
    "half the multiply-adds": 1.0,
    "the same, on labels alone": None,
    "half, of one trained as long": None,
}


def images_of(split: str, root: str | None) -> dict[str, Any]:
    """Return the recipe entry of the training or the test images."""
    if root is not None:
        return {"kind": "torchvision", "name": "FashionMNIST", "root": root, "split": split, "mode": "L"}
    return {"kind": "bundled", "split": split} | ({"num_images": 1000} if split == "train" else {})


def fill_cache(path: Path, root: str | None, num_views: int) -> None:
    """Fill the cache that all students learn from."""
    entry: dict[str, Any] = {
        "cache": str(path),
        "dataset": images_of("train", root),
        "views": {
            "num_views": num_views,
            "augmentations": [{"kind": "random_crop", "size": 28, "padding": 2}, {"kind": "horizontal_flip"}],
        },
        "teachers": {"teacher": {"model": {"kind": "bundled"}, "logits": {"kind": "dense"}}},
        "num_workers": 0,
    }
    precompute(load_recipe(entry, PrecomputeRecipe))


def losses_of(out: Path, cache: Path, root: str | None, width: int, epochs: int, seed: int) -> dict[str, float]:
    """Train and compress a student; return by method how many points of top-1 it costs."""
    recipe = {
        "out": str(out / f"student{seed}"),
        "cache": str(cache),
        "model": {"kind": "small_cnn", "width": width},
        "losses": [{"kind": "cross_entropy", "weight": 0.5}, {"kind": "kl_divergence", "weight": 0.5}],
        "optimizer": {"kind": "adamw", "lr": 0.004},
        "epochs": epochs,
        "batch_size": 128,
        "seed": seed,
        "num_workers": 0,
        "validation": {"dataset": images_of("test", root), "every": epochs},
    }
    student = train(load_recipe(recipe, StudentRecipe), resume=True)
    assert student.top1 is not None, "it has labels"
    run = student.out
    rounded = quantize(run, overwrite=True, least_agreement=0.0).parity.exported
    trained = train_quantized(run, out / f"qat{seed}", resume=True).exported.parity.exported
    pruned, labels = (
        prune(run, out / f"{folder}{seed}", changes, macs=0.5, round_to=2, resume=True).run.top1
        for folder, changes in (("pruned", ()), ("labels", (ON_LABELS,)))
    )
    further = recipe | {"out": str(out / f"further{seed}"), "model": {"kind": "run", "path": run}}
    longer = train(load_recipe(further, StudentRecipe), resume=True).top1
    assert longer is not None, "it has labels"
    pairs = [(student.top1, top1) for top1 in (rounded, trained, pruned, labels)] + [(longer, pruned)]
    found = {name: 100 * (before - (after or 0.0)) for name, (before, after) in zip(GOALS, pairs, strict=True)}
    return found | {"student": 100 * student.top1}


def rows_of(lost: list[dict[str, float]]) -> Iterator[Row]:
    """Average over the seeds."""
    tops = [of_seed["student"] for of_seed in lost]
    note = f"the students have {statistics.mean(tops):.2f} %, {len(lost)} seeds"
    for name, goal in GOALS.items():
        values = [of_seed[name] for of_seed in lost]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        yield Row(
            name, statistics.mean(values), goal or 0.0, "points", goal is not None, f"{deviation}  {note}".strip()
        )


def main() -> int:
    """Measure every seed, print the table, and return the exit code."""
    parser = parser_of(__doc__, "one seed of few images")
    parser.add_argument("--root", help="folder of the full set; by default the bundled images")
    parser.add_argument("--out", type=Path, default=Path("runs/compression"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32, help="of the student; the teacher has 32")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    configure(quiet=True)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            vars(arguments).update(QUICK, out=Path(temporary))
        cache = arguments.out / "cache.zarr"
        fill_cache(cache, arguments.root, min(arguments.epochs, 4))
        shape = (arguments.width, arguments.epochs)
        lost = [losses_of(arguments.out, cache, arguments.root, *shape, seed) for seed in range(arguments.seeds)]
    rows = list(rows_of(lost))
    if arguments.json:
        print_json([row._asdict() | {"met": row.met} for row in rows], seeds=lost)
    else:
        print("\n".join(row.line(30) for row in rows))
    return 0 if arguments.quick else exit_code(row.met for row in rows)


if __name__ == "__main__":
    sys.exit(main())
