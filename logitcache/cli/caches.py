"""The commands that read, check and repair a cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from logitcache.cli.common import CommandResult, Overrides, Scheduler, Trust, Workers
from logitcache.cli.completion import teachers

CachePath = Annotated[str, Argument(metavar="CACHE", help="A folder or a URL (s3://…) made by precompute or derive.")]


def summary(
    cache: CachePath,
    views: Annotated[int | None, Option("--views", min=1, metavar="N", help="Read only the first N views.")] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
) -> CommandResult:
    """Show the accuracy of the teachers and their ensemble, by view and by class, from the cache alone."""
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
        Option("--view", metavar="VIEW/IMAGE", help="Show a view of an image, given by its index or id, as in 0/17."),
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", metavar="FILE", help="Picture (.png) or page (.html) to write.", show_default="view-….html"),
    ] = None,
) -> CommandResult:
    """Describe a cache: its origin, completeness, size and encoding errors.

    With --view, write a picture of what the teacher saw, or a page with all views of the image and the teacher's most
    probable classes; --set dataset.root=DIR gives the folder of the images.
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
            help="Use this teacher; repeatable.",
            show_default="all with logits",
            autocompletion=teachers,
        ),
    ] = [],  # noqa: B006  # Typer's way
    top: Annotated[int, Option("--top", min=1, metavar="N", help="Show the first N.")] = 20,
    csv: Annotated[Path | None, Option("--csv", metavar="FILE", help="Write all listed labels as CSV.")] = None,
    sheet: Annotated[
        Path | None, Option("--sheet", metavar="FILE", help="Write an HTML page with the images of the first 200.")
    ] = None,
) -> CommandResult:
    """Rank labels that confident teachers contradict over many views, the most doubtful first.

    The ranking shows where to look and proves nothing: a teacher may have learnt a wrong label, or be wrong itself.
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
        Option("--repair", metavar="RECIPE", help="Rewrite damaged shards with the recipe that made the cache."),
    ] = None,
    pairing: Annotated[
        Path | None,
        Option("--pairing", metavar="DIR", help="Compare the paired images instead of those that the teacher saw."),
    ] = None,
) -> CommandResult:
    """Read a cache completely and compare every byte, and its canaries if the images are there.

    --set dataset.root=DIR gives the folder of its images, or of the paired ones.
    """
    if repair is not None and pairing is not None:
        raise BadParameter(
            "has no effect with --repair: a pairing is made by `logitcache pair`", param_hint="--pairing"
        )
    from logitcache.errors import CacheError
    from logitcache.report import verify_and_repair as verbs

    if repair is not None:
        result = verbs.repair(cache, repair, overrides, trust)
    else:
        result = verbs.verify(cache, overrides, trust, pairing)
    if result.error is None:
        return CommandResult(asdict(result), result.text, follows=("inspect", cache))
    return CommandResult(asdict(result), result.text, (result.error,), CacheError.__name__, CacheError.exit_code)


PairedSize = Annotated[
    str | None,
    Option(
        "--size",
        metavar="N|[H, W]",
        help="Size of the student's views.",
        show_default="the teacher's, scaled as the images are",
    ),
]
Colors = Annotated[
    list[str],
    Option(
        "--color", metavar="ENTRY", help="Colour augmentation for the student, '{kind: color_jitter, …}'; repeatable."
    ),
]


def pair(
    cache: CachePath,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of the pairing, for the key `pairing` of a student.")],
    trust: Trust,
    dataset: Annotated[
        str,
        Option("--dataset", metavar="DIR|ENTRY", help="The student's images: a folder, or '{kind: webdataset, …}'."),
    ],
    pairs: Annotated[
        Path | None,
        Option("--map", metavar="FILE", help="CSV with the columns teacher,student: one pair of ids per line."),
    ] = None,
    by: Annotated[
        Literal["id", "stem"], Option("--by", help="What pairs share: the id, or the id without the file extension.")
    ] = "id",
    size: PairedSize = None,
    color: Colors = [],  # noqa: B006  # Typer's way
    allow_unmatched: Annotated[
        bool, Option("--allow-unmatched", help="Leave out images without a pair, on either side.")
    ] = False,
    allow_doubled: Annotated[
        bool, Option("--allow-doubled", help="Take the first of several images with one id.")
    ] = False,
    teacher_dataset: Annotated[
        str | None,
        Option("--teacher-dataset", metavar="DIR|ENTRY", help="The teacher's images, if they moved since stage one."),
    ] = None,
) -> CommandResult:
    """Pair the images of a cache, by id, with other images of the same scenes for students to see.

    Crops, flips, mixing and erasing are shared, scaled to each image; colour augmentations are not.
    """
    from logitcache.cache.pairs import pair as verbs

    given = verbs.read_options(dataset, size, color, teacher_dataset)
    result = verbs.pair(
        cache,
        out,
        given.dataset,
        pairs=pairs,
        by=by,
        size=given.size,
        colors=given.colors,
        allow_unmatched=allow_unmatched,
        allow_doubled=allow_doubled,
        teacher_dataset=given.teacher_dataset,
        trust=trust,
    )
    return CommandResult(asdict(result), follows=("train-student", "RECIPE", "--set", f"pairing={out}"))


def gc(
    cache: CachePath,
    dry_run: Annotated[bool, Option("--dry-run", help="Remove nothing, only list the files.")] = False,
    growth: Annotated[
        bool, Option("--growth", help="Abandon an unfinished growth (views, teachers, features, images), too.")
    ] = False,
) -> CommandResult:
    """Remove files that killed writers left.

    Never removes committed files, and does nothing while a run writes to the cache.
    """
    from logitcache.cache.write.gc import collect

    found = collect(cache, dry_run=dry_run, growth=growth)
    total = sum(garbage.bytes for garbage in found)
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{garbage.path}: {garbage.why} ({garbage.bytes} bytes)\n" for garbage in found]
    text = "".join(lines) + f"{len(found)} files or folders, {total} bytes, {verb}\n"
    document = {"cache": cache, "dry_run": dry_run, "bytes": total, "found": [{**vars(item)} for item in found]}
    follows = ("gc", cache) if dry_run and found else ("verify", cache)
    return CommandResult(document, text, follows=follows)
