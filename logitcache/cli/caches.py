"""The commands that read, check and repair a cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from logitcache.cli.common import CommandResult, Overrides, Scheduler, Trust, Workers
from logitcache.cli.completion import teachers

CachePath = Annotated[str, Argument(metavar="CACHE", help="A folder or a URL (s3://…) made by precompute or derive.")]


def summary(
    cache: CachePath,
    views: Annotated[int | None, Option("--views", min=1, metavar="N", help="Read the first N views only.")] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> CommandResult:
    """Show how good the teachers are. Alone and together, by view and by class, from the cache alone."""
    from logitcache.report.summary import summarize
    from logitcache.stage_one.cluster.cluster import Cluster

    found = summarize(cache, views, Cluster(scheduler, workers))
    return CommandResult(asdict(found), follows=("inspect", cache))


def inspect(
    cache: CachePath,
    overrides: Overrides,
    trust: Trust,
    view: Annotated[
        str | None,
        Option("--view", metavar="VIEW/IMAGE", help="Look at a view of an image, by its index or id: 0/17."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out", metavar="FILE", help="The picture (.png) or page (.html) of the view.", show_default="view-….html"
        ),
    ] = None,
) -> CommandResult:
    """Describe a cache: what made it, how complete and how large it is.

    With --view, write what the teacher saw of an image and its most probable classes over all views; --set
    dataset.root=DIR gives the folder of the images.
    """
    if view is None:
        from logitcache.report.inspect import inspect_cache

        given = {"--out": out, "--set": overrides, "--trust": trust}
        if unused := [option for option, value in given.items() if value]:
            raise BadParameter("has no effect without --view", param_hint=unused)
        return CommandResult(inspect_cache(cache), follows=("summary", cache))
    from logitcache.report.look import look

    return CommandResult(asdict(look(cache, view, out, overrides, trust)), follows=("summary", cache))


def suspects(
    cache: CachePath,
    overrides: Overrides,
    trust: Trust,
    teacher: Annotated[
        list[str],
        Option(
            "--teacher",
            metavar="NAME",
            help="Ask this teacher; repeatable.",
            show_default="all with logits",
            autocompletion=teachers,
        ),
    ] = [],  # noqa: B006  # Typer's way
    top: Annotated[int, Option("--top", min=1, metavar="N", help="Show the first N.")] = 20,
    csv: Annotated[Path | None, Option("--csv", metavar="FILE", help="Write all of them as CSV.")] = None,
    sheet: Annotated[
        Path | None, Option("--sheet", metavar="FILE", help="Write a page with the images of the first 200.")
    ] = None,
) -> CommandResult:
    """Rank the labels that confident teachers contradict over many views, the most doubtful first.

    It shows where to look and proves nothing: a teacher may have learnt a wrong label, or be wrong itself.
    """
    from logitcache.report.suspects import find_suspects

    found = find_suspects(cache, overrides, trust, teachers=teacher, top=top, csv=csv, sheet=sheet)
    return CommandResult(asdict(found), follows=("inspect", cache, "--view", "VIEW/IMAGE"))


def verify(
    cache: CachePath,
    overrides: Overrides,
    trust: Trust,
    repair: Annotated[
        Path | None,
        Option("--repair", metavar="RECIPE", help="Write damaged shards again, by the recipe that made the cache."),
    ] = None,
) -> CommandResult:
    """Read a whole cache again. --set dataset.root=DIR gives the folder of its images."""
    from logitcache.errors import CacheError
    from logitcache.report import verify_and_repair as verbs

    result = verbs.repair(cache, repair, overrides, trust) if repair else verbs.verify(cache, overrides, trust)
    if result.error is None:
        return CommandResult(asdict(result), result.text, follows=("inspect", cache))
    return CommandResult(asdict(result), result.text, (result.error,), CacheError.__name__, CacheError.exit_code)


def gc(
    cache: CachePath,
    dry_run: Annotated[bool, Option("--dry-run", help="Remove nothing, only list it.")] = False,
    growth: Annotated[
        bool, Option("--growth", help="Give up unfinished views and teachers that were being added, too.")
    ] = False,
) -> CommandResult:
    """Remove files that killed writers left. Nothing that is committed, and not while a run writes to the cache."""
    from logitcache.cache.write.gc import collect

    found = collect(cache, dry_run=dry_run, growth=growth)
    total = sum(garbage.bytes for garbage in found)
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{garbage.path}: {garbage.why} ({garbage.bytes} bytes)\n" for garbage in found]
    text = "".join(lines) + f"{len(found)} files or folders, {total} bytes, {verb}\n"
    document = {"cache": cache, "dry_run": dry_run, "bytes": total, "found": [{**vars(item)} for item in found]}
    follows = ("gc", cache) if dry_run and found else ("verify", cache)
    return CommandResult(document, text, follows=follows)
