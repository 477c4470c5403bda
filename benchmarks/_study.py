"""What the studies of accuracy share: students by row and seed, each trained once, in parts; a table paired by seed."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _harness import parser_of, print_json

from logitcache.config.recipe import load_recipe
from logitcache.errors import LogitCacheError
from logitcache.runtime.console import configure, logger, silenced
from logitcache.stage_one.claims import parse_part
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.comparison.comparison import compare_measures
from logitcache.sweeps.comparison.table_formats import format_table
from logitcache.teacher.online import live_targets

TrainStudent = Callable[[argparse.Namespace, str, int], float]
"""Returns the top-1 accuracy of the student of a row and a seed."""
WAIT = 5.0
"""Seconds between looks at shards that another process writes."""


def study_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """Return the parser of a study, whose runs are by default in the folder `out`."""
    parser = parser_of(description, "a few steps of one seed")
    parser.add_argument("--root", help="folder of torchvision's data sets; by default the bundled test images")
    parser.add_argument(
        "--out", type=Path, help=f"folder of caches and runs, by default {out}; of --quick a temporary one"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", help="of the table, with commas; by default all")
    parser.add_argument("--part", default="1/1", metavar="i/n", help="each n-th student")
    parser.set_defaults(default_out=out)
    return parser


def chosen_rows(parser: argparse.ArgumentParser, chosen: str | None, names: list[str]) -> list[str]:
    """Return the rows that the command line names, by default all; exits with a message for an unknown one."""
    rows = chosen.split(",") if chosen else names
    if unknown := [name for name in rows if name not in names]:
        parser.error(f"--rows {unknown} are not among {', '.join(names)}")
    return rows


def fashion_mnist(split: str, root: str | None) -> dict[str, Any]:
    """Return the recipe entry of images: the full set in `root`, or the bundled ones."""
    if root is None:
        return {"kind": "bundled", "split": split}
    return {"kind": "torchvision", "name": "FashionMNIST", "root": root, "split": split, "mode": "L"}


def fill(recipe: PrecomputeRecipe) -> str:
    """Fill the cache of a recipe, or wait until the processes that fill it have done so; return its path."""
    while precompute(recipe).shards_left:
        time.sleep(WAIT)
    return recipe.cache


def fashion_cache(path: Path, dataset: dict[str, Any], views: dict[str, Any]) -> str:
    """Fill a cache of the shipped teacher, and return its path."""
    teachers = {"teacher": {"model": {"kind": "bundled"}, "logits": {"kind": "dense"}}}
    entries = {"cache": str(path), "dataset": dataset, "views": views, "teachers": teachers, "num_workers": 0}
    return fill(load_recipe(entries, PrecomputeRecipe))


def fashion_student(arguments: argparse.Namespace, row: str, seed: int, cache: str, **entries: Any) -> dict[str, Any]:
    """Return the recipe of the student of a row, measured after its last epoch."""
    return {
        "out": str(arguments.out / str(seed) / row),
        "cache": cache,
        "model": {"kind": "small_cnn", "width": arguments.width},
        "losses": [{"kind": "cross_entropy" if row.startswith("labels") else "kl_divergence"}],
        "optimizer": {"kind": "adamw", "lr": 0.004},
        "seed": seed,
        "num_workers": 0,
        "validation": {"dataset": fashion_mnist("test", arguments.root), "every": entries["epochs"]},
        **entries,
    }


def top1_of(entries: dict[str, Any], online: bool = False) -> float:
    """Train a student, or read what it measured; return its top-1 after the last epoch."""
    recipe = load_recipe(entries, StudentRecipe)
    with silenced():
        live = live_targets(recipe.cache, recipe.device) if online else None
        top1 = train(recipe, resume=True, live=live).top1
    assert top1 is not None, "the test images have labels"
    return top1


def run_study(arguments: argparse.Namespace, train_student: TrainStudent, baseline: str, **shared: Any) -> int:
    """Train what this part has to, and print the table; `shared` are conditions that it states."""
    configure(quiet=arguments.json)
    torch.set_num_threads(1)  # of so small a network more are slower
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or Path(temporary if arguments.quick else arguments.default_out)
        try:
            number, count = parse_part(arguments.part)
            jobs = [(row, seed) for seed in range(arguments.seeds) for row in arguments.rows]
            for row, seed in jobs[number - 1 :: count]:
                found.setdefault(row, {})[seed] = train_student(arguments, row, seed)
                logger.info(f"{row}, seed {seed}: {found[row][seed]:.2%}")
        except LogitCacheError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    comparison = compare_measures({row: measured(tops) for row, tops in found.items()}, baseline)
    if arguments.json:
        print_json(asdict(comparison), conditions=shared)
    else:
        print(format_table(comparison, "markdown"), shared, sep="\n")
    return 0


def measured(tops: Mapping[int, float]) -> dict[int, dict[str, float]]:
    """Return the measures of each seed of a row."""
    return {seed: {"top1": top} for seed, top in tops.items()}
