"""What is each loss worth to a student? One cache, one small student, every loss against plain training on labels.

    python benchmarks/losses.py [--root ROOT] [--out DIR] [--losses a,b,c] [--seeds n] [--epochs n] [--part i/n]
    python benchmarks/losses.py --quick [--json]

ROOT holds the full Fashion-MNIST as torchvision keeps it, in FashionMNIST/raw/. The recipes are those of
pipelines/losses: as many augmented views as epochs, the shipped teacher's logits and features. Students of a seed start
alike and take the same steps on the same views; they differ in their losses alone, and labels are one of the losses.
`gain` is a student's top-1 after the last epoch less that of the student on labels of the same seed: mean and deviation
over seeds. Weights are the published ones; most losses that were behind with these in a trial of one epoch, or that
have none, have a second row. Rows without a gain are printed again at the end, with their settings. The best epoch is
chosen on the test images.

Every student is a run in DIR, by default runs/losses: the same command goes on where it was stopped and trains no run
twice; --losses and --seeds make the table in pieces. `--part 1/2` and `--part 2/2` in two processes share the work,
each on its own core by OMP_NUM_THREADS=1, and print what they did; the command without it then prints the whole table.
`--limit N` takes N of the 5,000 bundled training images, and the bundled test images, in place of the full set.
`--quick` is one seed of few of them, which shows that everything runs, and no more.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import parser_of, print_json
from _study import fill

from logitcache.config.recipe import load_recipe
from logitcache.errors import LogitCacheError
from logitcache.runtime.console import configure, logger, silenced
from logitcache.stage_one.claims import Part, parse_part
from logitcache.stage_one.precompute import PrecomputeRecipe
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe

RECIPES = Path(__file__).parent.parent / "pipelines" / "losses"
QUICK = {"seeds": 1, "epochs": 1, "limit": 1000}
BASELINE = "labels"

Losses = list[dict[str, Any]]


def labels(weight: float = 1.0) -> dict[str, Any]:
    """Weigh the labels."""
    return {"kind": "cross_entropy", "weight": weight}


def logits(kind: str, weight: float = 1.0, **fields: Any) -> dict[str, Any]:
    """Weigh a loss on logits."""
    return {"kind": kind, "weight": weight, **fields}


def maps(kind: str, weight: float, feature: str = "maps", student: str = "0.8") -> dict[str, Any]:
    """Weigh a loss on what the last block gives."""
    return {"kind": kind, "weight": weight, "feature": feature, "student": student}


def vectors(kind: str, weight: float, **fields: Any) -> dict[str, Any]:
    """Weigh a loss on what the last layer takes."""
    return {"kind": kind, "weight": weight, "feature": "penultimate", "student": "3:input", **fields}


def attention(weight: float) -> Losses:
    """Weigh attention after both blocks."""
    pairs = {"0.4": "attention_early", "0.8": "attention_late"}
    return [maps("attention_transfer", weight, feature, tap) for tap, feature in pairs.items()]


KD_4 = [labels(0.1), logits("kl_divergence", 0.9, temperature=4)]
KD_1 = [labels(0.1), logits("kl_divergence", 0.9, temperature=1)]
ROWS: dict[str, Losses] = {
    BASELINE: [labels()],
    "kd_t4": KD_4,
    "kd_t1": KD_1,
    "kd_t1_unlabelled": [logits("kl_divergence", temperature=1)],
    "standardized": [labels(0.1), logits("kl_divergence", 9, temperature=2, standardize=True)],
    "mean_squared_error": [labels(), logits("mean_squared_error")],
    "mean_squared_error_0.1": [labels(), logits("mean_squared_error", 0.1)],
    "dkd": [labels(), logits("dkd", alpha=1, beta=8, temperature=4)],
    "dkd_beta_1": [labels(), logits("dkd", alpha=1, beta=1, temperature=1)],
    "nkd": [labels(), logits("nkd", gamma=1.5, temperature=1)],
    "dist": [labels(), logits("dist", 2, beta=1, gamma=1, temperature=1)],
    "wsld": [labels(), logits("wsld", 2.5, temperature=2)],
    "hint": [labels(), maps("hint", 100)],
    "hint_1": [labels(), maps("hint", 1)],
    "attention_transfer": [labels(), *attention(1000)],
    "attention_100": [labels(), *attention(100)],
    "grad_cam": [labels(), maps("grad_cam", 10, "grad_cam")],
    "grad_cam_100": [labels(), maps("grad_cam", 100, "grad_cam")],
    "similarity": [labels(), maps("similarity", 3000)],
    "similarity_300": [labels(), maps("similarity", 300)],
    "vid": [labels(), maps("vid", 1)],
    "rkd": [labels(), vectors("rkd", 1, distance=25, angle=50)],
    "rkd_0.1": [labels(), vectors("rkd", 0.1, distance=25, angle=50)],
    "pkt": [labels(), vectors("pkt", 30000)],
    "pkt_3000": [labels(), vectors("pkt", 3000)],
    "cka": [labels(), vectors("cka", 1)],
    "crd": [labels(), vectors("crd", 0.8, num_negatives=4096, temperature=0.07)],
    "srrl": [labels(), vectors("srrl", 1)],
    "srrl_0.1": [labels(), vectors("srrl", 0.1)],
    "kd_t4_hint": [*KD_4, maps("hint", 1)],
    "kd_t1_hint": [*KD_1, maps("hint", 1)],
}


def setting(losses: Losses) -> str:
    """Write a sum of losses as text."""
    return " + ".join(_term(**loss) for loss in losses)


def _term(kind: str, weight: float, feature: str = "", student: str = "", **fields: Any) -> str:
    inside = [feature, *(f"{name} {value}" for name, value in fields.items())]
    return f"{weight:g} {kind}({', '.join(filter(None, inside))})".removesuffix("()")


def fill_cache(arguments: argparse.Namespace) -> str:
    """Fill the cache that all students learn from, or wait until the processes that fill it have done so."""
    changes = [
        f"cache={arguments.out / 'cache.zarr'}",
        f"views.num_views={arguments.epochs}",
        *images(arguments, "dataset", "train"),
    ]
    return fill(load_recipe(RECIPES / "precompute.yaml", PrecomputeRecipe, changes))


def images(arguments: argparse.Namespace, key: str, split: str) -> list[str]:
    """Return the overrides that say where the images are."""
    if arguments.limit is None:
        return [f"{key}.root={arguments.root}"]
    count = f", num_images: {arguments.limit}" if split == "train" else ""
    return [f"{key}={{kind: bundled, split: {split}{count}}}"]


def train_students(arguments: argparse.Namespace, cache: str, part: Part) -> dict[str, dict[int, RunResult]]:
    """Train this part's students, or read what they measured, by row and seed."""
    results: dict[str, dict[int, RunResult]] = {}
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.losses]
    for number, (name, seed) in enumerate(jobs):
        if number % part[1] != part[0] - 1:
            continue
        result = train_student(arguments, cache, name, seed)
        results.setdefault(name, {})[seed] = result
        logger.info(f"{name}, seed {seed}: {100 * top1(result):.2f} %, {result.seconds:.0f} s")
    return results


def train_student(arguments: argparse.Namespace, cache: str, name: str, seed: int) -> RunResult:
    """Train one student; a run that is there already goes on, or is read."""
    changes = [
        f"out={arguments.out / name / str(seed)}",
        f"cache={cache}",
        f"seed={seed}",
        f"epochs={arguments.epochs}",
        f"num_views={arguments.epochs}",
        f"losses={json.dumps(ROWS[name])}",
        *images(arguments, "validation.dataset", "test"),
    ]
    with silenced():
        return train(load_recipe(RECIPES / "student.yaml", StudentRecipe, changes), resume=True)


def top1(result: RunResult) -> float:
    """Return the accuracy after the last epoch."""
    assert result.top1 is not None, "the test images have labels"
    return result.top1


def best(result: RunResult) -> float:
    """Return the highest accuracy of all epochs."""
    assert result.best_top1 is not None, "the test images have labels"
    return result.best_top1


def tabulate(results: dict[str, dict[int, RunResult]]) -> list[dict[str, Any]]:
    """Compare each row with plain training, seed by seed; in percent."""
    plain = results.get(BASELINE, {})
    rows = []
    for name, runs in results.items():
        gains = [top1(run) - top1(plain[seed]) for seed, run in runs.items() if seed in plain]
        rows.append(
            {
                "loss": name,
                "last": spread([top1(run) for run in runs.values()]),
                "best": spread([best(run) for run in runs.values()]),
                "gain": None if name == BASELINE else spread(gains),
                "seeds": sorted(runs),
                "seconds": round(statistics.mean(run.seconds for run in runs.values()), 1),
                "setting": setting(ROWS[name]),
            }
        )
    return rows


def spread(values: list[float]) -> dict[str, float] | None:
    """Return mean and deviation in percent points; None of no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(100 * statistics.mean(values), 2), "std": round(100 * deviation, 2)}


def conditions(arguments: argparse.Namespace, results: dict[str, dict[int, RunResult]]) -> str:
    """Say what all students share."""
    run = next(run for runs in results.values() for run in runs.values())
    recipe = load_recipe(RECIPES / "student.yaml", StudentRecipe)
    return (
        f"{run.images // run.epochs:,} images, {run.epochs} epochs of a view each, {run.steps} steps of "
        f"{recipe.batch_size} images, {recipe.optimizer.kind} lr {recipe.optimizer.lr:g}; "
        f"{run.num_parameters:,} parameters"
    )


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, and what did not help."""
    print(f"{'top-1, % of the test images':<28} {'last epoch':>13} {'best epoch':>13} {'gain':>14}  n seconds  setting")
    for row in rows:
        last, top, gain = (written(row[key], sign) for key, sign in (("last", ""), ("best", ""), ("gain", "+")))
        line = f"{row['loss']:<28} {last:>13} {top:>13} {gain:>14} {len(row['seeds']):>2} {row['seconds']:>7.0f}"
        print(f"{line}  {row['setting']}")
    for row in rows:
        if row["gain"] and len(row["seeds"]) > 1 and row["gain"]["mean"] <= 0:
            print(f"no gain over labels: {row['loss']}, tried as {row['setting']}")


def written(values: dict[str, float] | None, sign: str) -> str:
    """Write mean and deviation."""
    return "" if values is None else f"{values['mean']:{sign}.2f} ± {values['std']:.2f}"


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, "one seed of few images; nothing is judged")
    parser.add_argument("--root", type=Path, default=Path("datasets"), help="folder of torchvision's data sets")
    parser.add_argument("--out", type=Path, help="where cache and runs are kept; of --quick a folder that is removed")
    parser.add_argument("--losses", type=chosen, default=list(ROWS), metavar="a,b,c", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, metavar="N", help="N bundled images in place of the full set")
    parser.add_argument("--part", default="1/1", metavar="i/n", help="each n-th student")
    arguments = parser.parse_args(given)
    return argparse.Namespace(**{**vars(arguments), **(QUICK if arguments.quick else {})})


def chosen(text: str) -> list[str]:
    """Read names of rows; raises ArgumentTypeError for one that there is not."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"{unknown} are not among {', '.join(ROWS)}")
    return names


def main(given: list[str] | None = None) -> int:
    """Train what is not yet trained, and print the table."""
    arguments = parse(given)
    configure()
    with tempfile.TemporaryDirectory() as name:
        arguments.out = arguments.out or Path(name if arguments.quick else "runs/losses")
        try:
            part = parse_part(arguments.part)
            results = train_students(arguments, fill_cache(arguments), part)
        except LogitCacheError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    rows = tabulate(results)
    if arguments.json:
        print_json(rows, conditions=conditions(arguments, results))
    else:
        print(conditions(arguments, results))
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
