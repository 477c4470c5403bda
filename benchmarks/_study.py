"""What the studies of accuracy share: students by row and seed, each trained once, in parts; a table paired by seed."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
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
from logitcache.sweeps.comparison import Difference, Spread
from logitcache.teacher.online import live_targets

TrainStudent = Callable[[argparse.Namespace, str, int], float]
"""Returns the accuracy of the student of a row and a seed, in percent."""
Found = Mapping[str, Mapping[int, float]]
"""Accuracies in percent, by row and seed."""
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


def fill(entries: dict[str, Any]) -> str:
    """Fill the cache of a recipe, or wait until the processes that fill it have done so; return its path."""
    recipe = load_recipe(entries, PrecomputeRecipe)
    while precompute(recipe).shards_left:
        time.sleep(WAIT)
    return recipe.cache


def top1_of(entries: dict[str, Any], online: bool = False) -> float:
    """Train a student, or read what it measured; return its top-1 after the last epoch, in percent."""
    recipe = load_recipe(entries, StudentRecipe)
    with silenced():
        live = live_targets(recipe.cache, recipe.device) if online else None
        top1 = train(recipe, resume=True, live=live).top1
    assert top1 is not None, "the test images have labels"
    return 100 * top1


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
                logger.info(f"{row}, seed {seed}: {found[row][seed]:.2f} %")
        except LogitCacheError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    rows = tabulate(found, baseline)
    if arguments.json:
        print_json(rows, conditions=shared)
    else:
        show(rows, baseline, shared)
    return 0


def tabulate(found: Found, baseline: str) -> list[dict[str, Any]]:
    """Average each row, and its difference from the baseline, over seeds; in percent points."""
    base = found.get(baseline, {})
    rows = []
    for name, tops in found.items():
        less = [top - base[seed] for seed, top in tops.items() if seed in base and name != baseline]
        rows.append(
            {
                "row": name,
                "seeds": sorted(tops),
                "top1": rounded(vars(Spread.of([*tops.values()]))),
                "difference": rounded(vars(Difference.of(less))) if less else None,
            }
        )
    return rows


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Round what is in percent points to two decimals, probabilities to four."""
    digits = {"p": 4, "p_holm": 4, "p_sign": 4}
    return {
        name: round(value, digits.get(name, 2)) if isinstance(value, float) else value
        for name, value in figures.items()
        if value is not None
    }


def show(rows: list[dict[str, Any]], baseline: str, shared: Mapping[str, Any]) -> None:
    """Print the table."""
    print(
        f"{'row':<14} {'top-1, %':<16} {f'less {baseline}: mean ± deviation [95 % interval]':<50}  n   {dict(shared)}"
    )
    for row in rows:
        line = f"{row['row']:<14} {_written(row['top1']):<16} {_written(row['difference']):<50} {len(row['seeds']):>3}"
        print(line)


def _written(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    deviation = f" ± {figures['deviation']:.2f}" if "deviation" in figures else ""
    interval = f" [{figures['low']:+.2f}, {figures['high']:+.2f}]" if "low" in figures else ""
    sign = "+" if "above" in figures else ""
    return f"{figures['mean']:{sign}.2f}{deviation}{interval}"
