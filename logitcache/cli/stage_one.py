"""Stage one: the commands that make a cache, and `plan`, which estimates their cost."""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, BadParameter, Option

from logitcache.cli.common import CommandResult, Overrides, Part, Recipe, Scheduler, Trust, Wait, Workers, as_options
from logitcache.cli.help import DOCS
from logitcache.runtime.console import logger

if TYPE_CHECKING:
    from logitcache.stage_one.precompute import PrecomputeResult


FilePart = Annotated[
    str | None,
    Option("--part", metavar="I/N", help="Write only every N-th file; parts 1/N to N/N write all, in any order."),
]

EXIT_UNFINISHED = 75
"""As after a stop: what is finished is kept, and the same command continues."""


def plan(
    recipe: Recipe,
    overrides: Overrides,
    batches: Annotated[
        int | None,
        Option("--batches", min=1, metavar="N", show_default="32, or 20 s", help="Probe at most N batches."),
    ] = None,
    taps: Annotated[
        bool, Option("--taps", help="List the modules that features can tap, with their shapes and bytes.")
    ] = False,
    workers: Annotated[
        int, Option("--workers", min=1, metavar="N", help="Plan for N processes, each with a GPU if there are GPUs.")
    ] = 1,
    no_probe: Annotated[
        bool, Option("--no-probe", help="Predict only bytes and files, in seconds: each teacher runs on two images.")
    ] = False,
) -> CommandResult:
    """Predict the cost of precompute before running it.

    Shows bytes, files, time, memory and whether the disk has room; -v shows every figure. Writes nothing.
    """
    from logitcache.planning import plan as planning
    from logitcache.planning.plan_text import plan_text
    from logitcache.report.load_own import load_own
    from logitcache.teacher.precompute_recipe import PrecomputeRecipe

    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    document = planning.plan(wanted, batches=batches, taps=taps, workers=workers, probing=not no_probe)
    follows = ("precompute", str(recipe), *as_options(overrides))
    text = plan_text(document, every_figure=logger.isEnabledFor(logging.DEBUG))
    return CommandResult(
        document, f"{text}\nEvery figure: -v. Meanings: {DOCS}/how-to/plan-the-cost.md\n", follows=follows
    )


def precompute(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    wait: Wait = False,
) -> CommandResult:
    """Run the teachers once over every view.

    The same command continues after an interruption, and shares the work with other processes that run it. A recipe
    with more views or teachers adds only these; with new_images: append, it adds new images.
    """
    from logitcache.report.load_own import load_own
    from logitcache.stage_one.precompute import PrecomputeRecipe
    from logitcache.stage_one.precompute import precompute as run

    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    result = run(wanted, part=part, scheduler=scheduler, workers=workers, wait=wait)
    from logitcache.report.recipe_check import next_recipe

    return _answer(result, part, next_recipe(recipe) or ("inspect", wanted.cache))


def derive(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    wait: Wait = False,
) -> CommandResult:
    """Make a cache from a finished one, without running teachers.

    The new cache has logits in another encoding, or several teachers averaged into one. The same command continues
    after an interruption.
    """
    from logitcache.report.load_own import load_own
    from logitcache.stage_one.derive.derive import DeriveRecipe
    from logitcache.stage_one.derive.derive import derive as run

    wanted = load_own(recipe, DeriveRecipe, overrides)
    result = run(wanted, part=part, scheduler=scheduler, workers=workers, wait=wait)
    return _answer(result, part, ("inspect", wanted.out))


def materialize(
    source: Annotated[str, Argument(metavar="RECIPE|CACHE", help="A recipe of precompute, or a cache.")],
    out: Annotated[str, Argument(metavar="OUT", help="Folder or URL of the files.")],
    overrides: Overrides,
    trust: Trust,
    part: FilePart = None,
    form: Annotated[
        Literal["webdataset", "tfrecord", "npz"], Option("--format", help="Form of the files.")
    ] = "webdataset",
    pixels: Annotated[
        Literal["png", "raw"], Option("--pixels", help="Images as PNG, or as raw bytes; npz is always raw.")
    ] = "png",
    dry_run: Annotated[bool, Option("--dry-run", help="Predict files and bytes; write nothing.")] = False,
    num_workers: Annotated[int, Option("--num-workers", min=0, metavar="N", help="Rendering processes.")] = 2,
) -> CommandResult:
    """Write the views to files, for a teacher that runs elsewhere.

    Each view has its key, the id of its image and the CRC-32 of its pixels. The same command continues after an
    interruption. For a CACHE, --set dataset.root=DIR gives the folder of its images.
    """
    from logitcache.stage_one.materialize.materialize import materialize as write

    run = partial(write, form=form, pixels=pixels, part=part, dry_run=dry_run, num_workers=num_workers)
    if not source.endswith((".yaml", ".yml")):
        from logitcache.report.images import cache_images

        return CommandResult(asdict(run(source, out, **cache_images(source, overrides), trust=trust)))
    from logitcache.report.load_own import load_own
    from logitcache.teacher.precompute_recipe import PrecomputeRecipe

    if trust:
        raise BadParameter("has no effect on a recipe, which is your own", param_hint="--trust")
    result = run(load_own(source, PrecomputeRecipe, overrides), out)
    follows = ("import-targets", source, "ANSWERS", "--whose", "WHOSE", *as_options(overrides))
    return CommandResult(asdict(result), follows=() if dry_run or result.files_left else follows)


def synthesize(
    teacher: Annotated[
        str, Argument(metavar="TEACHER", help="A recipe, the folder of a run, timm:NAME or torchvision:NAME.")
    ],
    out: Annotated[str, Argument(metavar="OUT", help="Folder or URL of the images.")],
    overrides: Overrides,
    student: Annotated[
        Path | None,
        Option("--student", metavar="RUN", help="Add a round: images on which this student and the teacher disagree."),
    ] = None,
    part: Annotated[
        str | None,
        Option("--part", metavar="I/N", help="Make only every N-th batch; parts 1/N to N/N make all, in any order."),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Time two steps and predict the total time; write nothing.")
    ] = False,
) -> CommandResult:
    """Synthesize images from a teacher by DeepInversion, without reading images.

    The teacher needs BatchNorm. OUT gets PNG files in class folders, or tar archives, and the final losses of each
    batch. The same command continues after an interruption; precompute takes the images like any others.
    """
    from logitcache.report.new_recipes.synthesis import load_synthesis
    from logitcache.stage_one.synthesize.synthesize import synthesize as run

    result = run(load_synthesis(teacher, overrides), out, student=student, part=part, dry_run=dry_run)
    follows: tuple[str, ...] = ("recipe", "new", "--images", result.images, "--teacher", teacher, "--student", "MODEL")
    if teacher.endswith((".yaml", ".yml")):
        beside = Path(teacher).with_name("precompute.yaml")
        follows = ("precompute", str(beside) if beside.is_file() else "RECIPE")
    return CommandResult(asdict(result), follows=() if result.batches_left else follows)


def import_targets(
    recipe: Recipe,
    answers: Annotated[str, Argument(metavar="ANSWERS", help="File, or folder of files, with a teacher's outputs.")],
    overrides: Overrides,
    whose: Annotated[str, Option("--whose", metavar="TEXT", help="Description of the teacher, for the manifest.")],
    teacher: Annotated[
        str | None, Option("--teacher", metavar="NAME", show_default="the only one", help="Teacher of the recipe.")
    ] = None,
    trust_pixels: Annotated[
        bool, Option("--trust-pixels", help="Accept answers without a CRC-32 of their pixels.")
    ] = False,
    num_classes: Annotated[
        int | None,
        Option("--num-classes", min=1, metavar="N", help="Number of classes, for answers with only the top k."),
    ] = None,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    wait: Wait = False,
) -> CommandResult:
    """Make a cache from a teacher's outputs in files.

    RECIPE is a precompute recipe; the files replace the model of one of its teachers. Resumes, shares and grows as
    precompute does.
    """
    from logitcache.report.load_own import load_own
    from logitcache.stage_one.precompute import PrecomputeRecipe
    from logitcache.stage_one.precompute import precompute as run
    from logitcache.teacher.imported_teacher import with_answers

    entry = {"path": answers, "whose": whose, "num_classes": num_classes}
    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    wanted = with_answers(wanted, teacher, entry | {"pixels": "trusted" if trust_pixels else "proven"})
    result = run(wanted, part=part, scheduler=scheduler, workers=workers, wait=wait)
    return _answer(result, part, ("inspect", wanted.cache))


def _answer(result: "PrecomputeResult", part: str | None, follows: tuple[str, ...]) -> CommandResult:
    """Report the shards that a run wrote and those that are left.

    A cache that is not whole is an error, unless only a part was asked for.
    """
    if not result.shards_left:
        return CommandResult(asdict(result), follows=follows)
    found = f"{result.shards_left} of {result.shards} shards are not committed ({result.left})"
    if part is not None:
        logger.info(f"{result.cache} is not whole yet: {found}")
        return CommandResult(asdict(result))
    again = "the same command computes what is free"
    fix = f"--wait, to wait for these processes; or once they have ended {again}" if result.left.held else again
    return CommandResult(
        asdict(result), None, (f"{result.cache} is not whole: {found}. Fix: {fix}",), "Unfinished", EXIT_UNFINISHED
    )
