"""The commands: each parses its arguments, calls one verb and returns the answer.

Verbs are imported inside the functions: `--help` must not wait for torch.
"""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Exit, Option, Typer, echo

from logitcache.cli.common import Answer, Overrides, Part, Scheduler, Workers, command

if TYPE_CHECKING:
    from logitcache.student.training import RunResult

app = Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a teacher once, then train any number of students on the pixels it saw.",
)
recipe_app = Typer(rich_markup_mode=None, help="Look after recipes.")
app.add_typer(recipe_app, name="recipe")


class Verify(StrEnum):
    """How exactly the pixels rendered here must be those that the teacher saw."""

    STRICT = "strict"
    NUMERIC = "numeric"
    OFF = "off"


Recipe = Annotated[Path, Argument(metavar="RECIPE", help="A YAML file.")]
CachePath = Annotated[str, Argument(metavar="CACHE", help="A folder or a URL (s3://…) made by precompute.")]
Resume = Annotated[bool, Option("--resume", help="Continue from the last checkpoint.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import logitcache

        echo(f"logitcache {logitcache.__version__}")
        raise Exit


@app.callback()
def _program(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@command(app, "demo")
def demo(
    out: Annotated[Path, Option("--out", metavar="DIR", help="Where the cache and the students go.")] = Path(
        "logitcache-demo"
    ),
    quick: Annotated[bool, Option("--quick", help="A few seconds; the numbers mean little.")] = False,
) -> Answer:
    """Tell the whole story on the bundled images, in about a minute."""
    from logitcache.report.demo import run_demo

    return Answer(asdict(run_demo(out, quick=quick)))


@command(app, "plan")
def plan(
    recipe: Recipe,
    overrides: Overrides,
    batches: Annotated[
        int | None,
        Option("--batches", min=1, metavar="N", show_default="32, or 20 s", help="Probe at most N batches."),
    ] = None,
    taps: Annotated[
        bool, Option("--taps", help="List the modules that features could tap, with what they take.")
    ] = False,
    workers: Annotated[
        int, Option("--workers", min=1, metavar="N", help="Estimate N processes, each with a GPU if any.")
    ] = 1,
) -> Answer:
    """Tell what precompute will take: bytes, files, time, memory, and whether the disk holds it. Writes nothing."""
    from logitcache.recipe import load_recipe
    from logitcache.report.plan import plan as tell
    from logitcache.report.plan import plan_text
    from logitcache.teacher.recipes import PrecomputeRecipe

    wanted = load_recipe(recipe, PrecomputeRecipe, overrides)
    document = tell(wanted, batches=batches, taps=taps, workers=workers)
    return Answer(document, plan_text(document))


@command(app, "precompute")
def precompute(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> Answer:
    """Run the teachers once over every view.

    The same command continues after a stop, and shares the work with others of its kind. A recipe that asks for more
    views or further teachers adds just these.
    """
    from logitcache.recipe import load_recipe
    from logitcache.teacher.precompute import PrecomputeRecipe

    plan = load_recipe(recipe, PrecomputeRecipe, overrides)
    if scheduler is None and workers is None:
        from logitcache.teacher.precompute import precompute as run

        return Answer(asdict(run(plan, part=part)))
    from logitcache.teacher.cluster import precompute_on_cluster

    return Answer(asdict(precompute_on_cluster(plan, scheduler=scheduler, workers=workers, part=part)))


@command(app, "derive")
def derive(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> Answer:
    """Make a cache from a finished one: logits in another encoding, or several teachers as one.

    Reads neither images nor teachers. The same command continues after a stop.
    """
    from logitcache.recipe import load_recipe
    from logitcache.teacher.derive import DeriveRecipe, derive_on_cluster
    from logitcache.teacher.derive import derive as run

    plan = load_recipe(recipe, DeriveRecipe, overrides)
    if scheduler is None and workers is None:
        return Answer(asdict(run(plan, part=part)))
    return Answer(asdict(derive_on_cluster(plan, scheduler=scheduler, workers=workers, part=part)))


@command(app, "train-student")
def train_student(
    recipe: Recipe,
    overrides: Overrides,
    resume: Resume = False,
    online: Annotated[bool, Option("--online", help="Put the teacher back in the loop, to compare.")] = False,
    verify: Annotated[
        Verify | None,
        Option("--verify", help="How exactly the pixels must be those that the teacher saw."),
    ] = None,
) -> Answer:
    """Train a student from a cache, with no teacher in the loop."""
    from logitcache.recipe import load_recipe
    from logitcache.student.ranks import joined
    from logitcache.student.recipes import StudentRecipe
    from logitcache.student.training import train

    changes = overrides if verify is None else [*overrides, f"verify={verify}"]
    with joined() as ranks:
        student = load_recipe(recipe, StudentRecipe, changes)
        live = None
        if online:
            from logitcache.teacher.online import live_targets

            live = live_targets(student.cache, student.device, student.teachers)
        return _trained(train(student, resume=resume, live=live), ranks.is_first)


@command(app, "train-teacher")
def train_teacher(recipe: Recipe, overrides: Overrides, resume: Resume = False) -> Answer:
    """Train a teacher on labels, by the same loop."""
    from logitcache.recipe import load_recipe
    from logitcache.student.ranks import joined
    from logitcache.student.recipes import TeacherRecipe
    from logitcache.student.training import train

    with joined() as ranks:
        result = train(load_recipe(recipe, TeacherRecipe, overrides), resume=resume)
        return _trained(result, ranks.is_first)


def _trained(result: "RunResult", is_shown: bool) -> Answer:
    """Leave out of the text what such images are not measured by."""
    from logitcache.report.tables import as_text

    document = asdict(result)
    text = as_text({name: value for name, value in document.items() if value is not None})
    return Answer(document, text, is_shown=is_shown)


@command(app, "evaluate")
def evaluate(
    run: Annotated[Path, Argument(metavar="RUN", help="A folder made by training.")],
    overrides: Overrides,
    latency: Annotated[
        bool, Option("--latency", help="Time the model too, and the teachers where they can be built.")
    ] = False,
    batch_size: Annotated[
        list[int],
        Option("--batch-size", min=1, metavar="N", show_default="1, 32", help="Images at a time; repeatable."),
    ] = [],  # noqa: B006  # Typer's way
    threads: Annotated[
        list[int],
        Option("--threads", min=1, metavar="N", show_default="all", help="CPU threads; repeatable."),
    ] = [],  # noqa: B006
    repeats: Annotated[
        int | None,
        Option("--repeats", min=1, metavar="N", show_default="30", help="Batches to take the median of."),
    ] = None,
    warm_up: Annotated[
        int | None, Option("--warm-up", min=1, metavar="N", show_default="5", help="Batches that do not count.")
    ] = None,
) -> Answer:
    """Measure a trained model again, on its own or (--set validation.…) on other images.

    The options from --batch-size to --warm-up say how to time, and need --latency.
    """
    options = {"--batch-size": batch_size, "--threads": threads, "--repeats": repeats, "--warm-up": warm_up}
    unused = [option for option, value in options.items() if value and not latency]
    if unused:
        raise BadParameter("says how to time, and nothing is timed without --latency", param_hint=unused)
    from logitcache.report.evaluation import evaluate_beside_teachers
    from logitcache.student.cost import LatencyPlan

    timing = {"batch_sizes": tuple(batch_size), "threads": tuple(threads), "repeats": repeats, "warm_up": warm_up}
    plan = LatencyPlan.model_validate({key: value for key, value in timing.items() if value}) if latency else None
    return Answer(asdict(evaluate_beside_teachers(run, overrides, plan)))


@command(app, "summary")
def summary(
    cache: CachePath,
    views: Annotated[int | None, Option("--views", min=1, metavar="N", help="Read the first N views only.")] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> Answer:
    """Show how good the teachers are, alone and together, by view and by class, from the cache alone."""
    from logitcache.report.summary import summarize
    from logitcache.teacher.gathering import Cluster

    return Answer(asdict(summarize(cache, views, Cluster(scheduler, workers))))


@command(app, "inspect")
def inspect(cache: CachePath) -> Answer:
    """Show what a cache is, what made it and how large it is."""
    from logitcache.report.inspect import inspect_cache

    return Answer(inspect_cache(cache))


@command(app, "verify")
def verify(
    cache: CachePath,
    overrides: Overrides,
    repair: Annotated[
        Path | None,
        Option("--repair", metavar="RECIPE", help="Write what is damaged again, by the recipe that made the cache."),
    ] = None,
) -> Answer:
    """Read a whole cache again; --set dataset.root=DIR says where its images are now."""
    from logitcache.errors import CacheError
    from logitcache.report.verification import repair as mend
    from logitcache.report.verification import verify as check

    result = check(cache, overrides) if repair is None else mend(cache, repair, overrides)
    code = CacheError.exit_code if result.problems else 0
    return Answer(asdict(result), None, result.problems, CacheError.__name__, code)


@command(app, "gc")
def gc(
    cache: CachePath,
    dry_run: Annotated[bool, Option("--dry-run", help="Remove nothing, only say what would be.")] = False,
    growth: Annotated[
        bool, Option("--growth", help="Give up unfinished views and teachers that were being added, too.")
    ] = False,
) -> Answer:
    """Remove what killed writers left behind; nothing that is committed, and not while a precompute is at work."""
    from logitcache.cache.garbage import collect

    found = collect(cache, dry_run=dry_run, growth=growth)
    total = sum(garbage.bytes for garbage in found)
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{garbage.path}: {garbage.why} ({garbage.bytes} bytes)\n" for garbage in found]
    text = "".join(lines) + f"{len(found)} files or folders, {total} bytes, {verb}\n"
    document = {"cache": cache, "dry_run": dry_run, "bytes": total, "found": [asdict(item) for item in found]}
    return Answer(document, text)


@command(recipe_app, "check")
def recipe_check(
    recipes: Annotated[list[Path], Argument(metavar="RECIPE", help="YAML files of any kind.")],
    overrides: Overrides,
) -> Answer:
    """Say whether recipes are valid, with every mistake in them; reads no images."""
    from logitcache.errors import RecipeError
    from logitcache.report.recipes import check_recipes

    checked = check_recipes(recipes, overrides)
    errors = tuple(recipe.error for recipe in checked if recipe.error is not None)
    text = "".join(f"OK {r.path} ({r.command})\n" for r in checked if r.error is None)
    document = {"recipes": [asdict(recipe) for recipe in checked]}
    code = RecipeError.exit_code if errors else 0
    return Answer(document, text, errors, RecipeError.__name__, code)


@command(app, "env")
def env() -> Answer:
    """Show the versions and devices that decide results."""
    from logitcache.report.environment import environment

    return Answer(environment())
