"""The commands of stage two: train, sweep and evaluate."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, BadParameter, Option

from logitcache.cli.common import (
    BatchSizes,
    CommandResult,
    Overrides,
    Recipe,
    Repeats,
    Resume,
    Scheduler,
    Threads,
    Trust,
    WarmUp,
    Workers,
    granted,
    latency_plan,
)
from logitcache.errors import RecipeError
from logitcache.runtime.tables import TableFormat

if TYPE_CHECKING:
    from logitcache.shipping.model_table import ModelTable
    from logitcache.student.evaluation.evaluate import EvaluationResult
    from logitcache.student.runs.run_result import RunResult

TeachersFrom = Annotated[
    Path | None,
    Option("--teachers-from", metavar="RECIPE", help="Build teachers of kind custom from this precompute recipe."),
]


def train_student(
    recipe: Recipe,
    overrides: Overrides,
    trust: Trust,
    resume: Resume = False,
    online: Annotated[bool, Option("--online", help="Run the teacher in the loop instead, to compare.")] = False,
    teachers_from: TeachersFrom = None,
    verify: Annotated[
        Literal["strict", "numeric", "off"] | None,
        Option("--verify", help="How exactly rendered pixels must match those that the teacher saw."),
    ] = None,
    shuffled: Annotated[
        bool, Option("--shuffled", help="Control run for a pairing: give each image the targets of another.")
    ] = False,
) -> CommandResult:
    """Train a student from a cache, without a teacher in the loop."""
    if teachers_from is not None and not online:
        raise BadParameter("has no effect: no teachers are in the loop without --online", param_hint="--teachers-from")
    from logitcache.report.load_own import load_own, require_made
    from logitcache.student.distributed.ranks import joined
    from logitcache.student.training import train
    from logitcache.student.training_recipes import StudentRecipe

    changes = [
        *overrides,
        *granted(trust),
        *([] if verify is None else [f"verify={verify}"]),
        *["shuffled=true"] * shuffled,
    ]
    with joined() as ranks:
        student = load_own(recipe, StudentRecipe, changes)
        require_made(recipe, student)
        live = None
        if online:
            from logitcache.teacher.online import live_targets

            sources = student.teachers
            if teachers_from is not None:
                from logitcache.report.beside_teachers import teachers_of

                sources = teachers_of(teachers_from, student.cache) | sources
            live = live_targets(student.cache, student.device, sources, trust=student.trust)
        return _trained(train(student, resume=resume, live=live), ranks.is_first)


def train_teacher(recipe: Recipe, overrides: Overrides, resume: Resume = False) -> CommandResult:
    """Train a teacher on labels, with the same loop."""
    from logitcache.report.load_own import load_own
    from logitcache.student.distributed.ranks import joined
    from logitcache.student.training import train
    from logitcache.student.training_recipes import TeacherRecipe

    with joined() as ranks:
        taught = load_own(recipe, TeacherRecipe, overrides)
        result = train(taught, resume=resume)
        images = str(getattr(taught.dataset, "root", "DIR"))
        words = ("recipe", "new", "--images", images, "--teacher", f"run:{result.out}", "--student", "torchvision:NAME")
        return replace(_trained(result, ranks.is_first), follows=words)


Grid = Annotated[
    list[str],
    Option("--grid", metavar="KEY=V1,V2", help="Train with each of these values; if repeated, with all combinations."),
]
Space = Annotated[
    list[str],
    Option(
        "--space",
        metavar="KEY=V1,V2",
        help="Search these values, or a range: '{kind: log_uniform, low: 1e-3, high: 0.1}'; repeatable.",
    ),
]


def sweep(
    recipe: Recipe,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of the runs and the comparison.")],
    overrides: Overrides,
    trust: Trust,
    grid: Grid = [],  # noqa: B006  # Typer's way
    search: Annotated[
        str | None,
        Option("--search", metavar="KIND", help="random, optuna, or a mapping: '{kind: optuna, batch: 4}'."),
    ] = None,
    space: Space = [],  # noqa: B006
    trials: Annotated[
        int | None, Option("--trials", min=1, metavar="N", help="Total number of trials, including earlier ones.")
    ] = None,
    seeds: Annotated[
        int | None, Option("--seeds", min=1, metavar="N", show_default="1", help="Number of seeds of each cell.")
    ] = None,
    baseline: Annotated[
        str | None,
        Option("--baseline", metavar="CELL", help="Cell that the others are compared with; by default the first."),
    ] = None,
    table: Annotated[
        TableFormat | None,
        Option("--table", help="Print only the comparison, in this format."),
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> CommandResult:
    """Train many students from one cache on shared batches, and compare them.

    RECIPE is a student recipe or a sweep recipe (kind: sweep). Cells are all combinations of --grid, or the --trials
    of a --space: drawn at random, or chosen by Optuna. The same command continues after an interruption; for a finished
    sweep, it prints the comparison.
    """
    from logitcache.report.load_own import require_made
    from logitcache.report.recipe_check import load_sweep
    from logitcache.runtime.tables import as_text
    from logitcache.stage_one.cluster.cluster import Cluster
    from logitcache.sweeps import sweep as sweeping
    from logitcache.sweeps.comparison.table_formats import format_table, shown_rows, shown_trials
    from logitcache.sweeps.search.trials import parse_search

    searching = parse_search(search, space, trials)
    found = load_sweep(recipe, overrides, trust=trust, grid=grid, search=searching, seeds=seeds, baseline=baseline)
    require_made(recipe, found.student)
    result = sweeping.sweep(found, out, Cluster(scheduler, workers))
    document = asdict(result)
    if table is not None:
        text = format_table(result.comparison, table)
    else:
        shown = {key: value for key, value in document.items() if key not in ("comparison", "failed", "exit_code")}
        tables = {"trials": shown_trials(result.trials), "cells": shown_rows(result.comparison)}
        text = as_text(shown | tables)
    errors = tuple(f"{run} failed: {why}" for run, why in result.failed.items())
    return CommandResult(document, text, errors, "FailedStudents", result.exit_code)


def _trained(result: "RunResult", is_shown: bool) -> CommandResult:
    """Leave measures out of the text that such images have not."""
    from logitcache.runtime.tables import as_text

    document = asdict(result)
    text = as_text({name: value for name, value in document.items() if value is not None})
    return CommandResult(document, text, is_shown=is_shown, follows=("evaluate", result.out))


def evaluate(
    models: Annotated[list[Path], Argument(metavar="RUN|FILE...", help="Run folders and exported ONNX files.")],
    overrides: Overrides,
    trust: Trust,
    teachers_from: TeachersFrom = None,
    latency: Annotated[
        bool, Option("--latency", help="Time the model too, and the teachers that can be built.")
    ] = False,
    batch_size: BatchSizes = [],  # noqa: B006  # Typer's way
    threads: Threads = [],  # noqa: B006
    repeats: Repeats = None,
    warm_up: WarmUp = None,
    table: Annotated[
        TableFormat | None, Option("--table", help="Print only the table of models, in this format.")
    ] = None,
) -> CommandResult:
    """Evaluate a run; or several runs and exported files, with their teachers, in one table.

    Uses the validation images of the first run, or those of --set validation.…, which is required without a run. If a
    teacher that you name cannot be built or run, the other figures are printed and the exit code is 2. The options from
    --batch-size to --warm-up need --latency.
    """
    plan = latency_plan(latency, batch_size, threads, repeats, warm_up)
    from logitcache.report.beside_teachers import compare_beside_teachers, evaluate_beside_teachers
    from logitcache.runtime.tables import as_text
    from logitcache.shipping.exported import is_exported
    from logitcache.shipping.table_formats import format_models, shown_models

    changes = [*overrides, *granted(trust)]
    result: EvaluationResult | ModelTable
    if len(models) > 1 or is_exported(models[0]) or table is not None:
        result = compare_beside_teachers(models, changes, plan, teachers_from)
        shown = {"images": result.images, "device": result.device, "models": shown_models(result)}
        text = as_text(shown) if table is None else format_models(result, table)
    else:
        result = evaluate_beside_teachers(models[0], changes, plan, teachers_from)
        rows = asdict(result) | ({} if result.epoch is not None else {"epoch": "not recorded"})
        if not any(one.images for one in result.per_class):
            del rows["per_class"]
        text = as_text(rows)
    failed = tuple(
        f"teacher {name!r} is neither counted nor timed: {result.teachers_left_out[name]}"
        for name in result.teachers_failed
    )
    code = RecipeError.exit_code if failed else 0
    follows = ("predict", str(models[0]), "IMAGE")
    return CommandResult(asdict(result), text, failed, RecipeError.__name__, code, follows=follows)


def predict(
    run: Annotated[Path, Argument(metavar="RUN|FILE", help="A run folder or an exported ONNX file.")],
    images: Annotated[
        list[str], Argument(metavar="IMAGE...", help="Image files, folders, or URLs (https://…, s3://…).")
    ],
    overrides: Overrides,
    trust: Trust,
    top: Annotated[int, Option("--top", min=1, metavar="K", help="Show the K most probable classes.")] = 5,
    batch_size: Annotated[int, Option("--batch-size", min=1, metavar="N", help="Images per batch.")] = 32,
    orientation: Annotated[
        Literal["ignore", "apply"] | None,
        Option(
            "--orientation",
            show_default="as for the run's validation images",
            help="Whether images are rotated by their EXIF orientation.",
        ),
    ] = None,
) -> CommandResult:
    """Predict the classes of images with a trained or exported model.

    Images are transformed as in the run's evaluation. For a folder, all images below it are predicted. --set device=cpu
    chooses the device. If images cannot be read, the others are predicted and the exit code is 2.
    """
    from logitcache.errors import DataError
    from logitcache.shipping.predict import predict as predicted
    from logitcache.student.evaluation.predict import predictions_text

    found = predicted(
        run, images, [*overrides, *granted(trust)], top=top, batch_size=batch_size, orientation=orientation
    )
    errors = tuple(one.error for one in found if one.error is not None)
    document = {
        "run": str(run),
        "images": len(found),
        "failed": len(errors),
        "predictions": [asdict(one) for one in found],
    }
    text = predictions_text(found)
    return CommandResult(document, text, errors, DataError.__name__, DataError.exit_code if errors else 0)
