"""Stage one: the commands that make a cache, and the one that tells what that takes."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from logitcache.cli.common import Answer, Overrides, Part, Recipe, Scheduler, Workers

if TYPE_CHECKING:
    from logitcache.teacher.precompute import PrecomputeResult


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
) -> Answer:
    """Tell what precompute will take, before it begins.

    Bytes, files, time, memory, and whether the disk holds it. Writes nothing.
    """
    from logitcache.report.plan import plan as tell
    from logitcache.report.plan import plan_text
    from logitcache.report.recipes import load_own
    from logitcache.teacher.recipes import PrecomputeRecipe

    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    document = tell(wanted, batches=batches, taps=taps, workers=workers)
    return Answer(document, plan_text(document))


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
    from logitcache.report.recipes import load_own
    from logitcache.teacher.cluster import precompute_on_cluster
    from logitcache.teacher.precompute import PrecomputeRecipe
    from logitcache.teacher.precompute import precompute as run

    wanted = load_own(recipe, PrecomputeRecipe, overrides)
    return _filled(wanted, part, scheduler, workers, here=run, on_cluster=precompute_on_cluster)


def derive(
    recipe: Recipe,
    overrides: Overrides,
    part: Part = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> Answer:
    """Make a cache from a finished one, with no teacher.

    It keeps logits in another encoding, or several teachers as one. Reads neither images nor teachers. The same command
    continues after a stop.
    """
    from logitcache.report.recipes import load_own
    from logitcache.teacher.derive import DeriveRecipe, derive_on_cluster
    from logitcache.teacher.derive import derive as run

    wanted = load_own(recipe, DeriveRecipe, overrides)
    return _filled(wanted, part, scheduler, workers, here=run, on_cluster=derive_on_cluster)


def _filled(
    recipe: Any,
    part: str | None,
    scheduler: str | None,
    workers: int | None,
    *,
    here: "Callable[..., PrecomputeResult]",
    on_cluster: "Callable[..., PrecomputeResult]",
) -> Answer:
    """Fill a cache in this process, or by a cluster where an option names one; one that is not whole is an error.

    Of a part, the rest is for other parts.
    """
    if scheduler is None and workers is None:
        result = here(recipe, part=part)
    else:
        result = on_cluster(recipe, scheduler=scheduler, workers=workers, part=part)
    if part is not None or not result.shards_left:
        return Answer(asdict(result))
    error = (
        f"{result.cache} is not whole yet: {result.shards_left} of {result.shards} shards are not committed. "
        "Fix: the same command again, once the processes that compute these have ended: it writes what they leave"
    )
    return Answer(asdict(result), None, (error,), "Unfinished", EXIT_UNFINISHED)
