"""Stage one: the commands that make a cache, and `plan`, which estimates their cost."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Option

from logitcache.cli.common import CommandResult, Overrides, Part, Recipe, Scheduler, Wait, Workers, as_options
from logitcache.runtime.console import logger

if TYPE_CHECKING:
    from logitcache.stage_one.precompute import PrecomputeResult


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
        bool, Option("--taps", help="List the modules that features could tap, with what they take.")
    ] = False,
    workers: Annotated[
        int, Option("--workers", min=1, metavar="N", help="Estimate N processes, each with a GPU if any.")
    ] = 1,
    no_probe: Annotated[
        bool, Option("--no-probe", help="Bytes and files alone, at most, in seconds: two images are answered.")
    ] = False,
) -> CommandResult:
    """Predict what precompute takes, before it begins.

    Bytes, files, time, memory, and whether the disk has room. Writes nothing.
    """
    from logitcache.planning import plan as planning
    from logitcache.report.load_own import load_own
    from logitcache.teacher.precompute_recipe import PrecomputeRecipe

    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    document = planning.plan(wanted, batches=batches, taps=taps, workers=workers, probing=not no_probe)
    follows = ("precompute", str(recipe), *as_options(overrides))
    return CommandResult(document, planning.plan_text(document), follows=follows)


def precompute(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    wait: Wait = False,
) -> CommandResult:
    """Run the teachers once over every view.

    The same command continues after a stop, and shares the work with others of its kind. A recipe that asks for more
    views or further teachers adds just these.
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
    """Make a cache from a finished one, with no teacher.

    It keeps logits in another encoding, or several teachers as one. Reads neither images nor teachers. The same command
    continues after a stop.
    """
    from logitcache.report.load_own import load_own
    from logitcache.stage_one.derive.derive import DeriveRecipe
    from logitcache.stage_one.derive.derive import derive as run

    wanted = load_own(recipe, DeriveRecipe, overrides)
    result = run(wanted, part=part, scheduler=scheduler, workers=workers, wait=wait)
    return _answer(result, part, ("inspect", wanted.out))


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
