"""The commands that read, check and repair a cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from logitcache.cli.common import CommandResult, Overrides, Scheduler, Trust, Workers

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

    return CommandResult(asdict(summarize(cache, views, Cluster(scheduler, workers))))


def inspect(cache: CachePath) -> CommandResult:
    """Describe a cache: what made it, how complete and how large it is."""
    from logitcache.report.inspect import inspect_cache

    return CommandResult(inspect_cache(cache))


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
        return CommandResult(asdict(result), result.text)
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
    document = {"cache": cache, "dry_run": dry_run, "bytes": total, "found": [asdict(item) for item in found]}
    return CommandResult(document, text)
