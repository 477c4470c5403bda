"""The commands that show results: pages, and the trackers of others."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from logitcache.cli.common import CommandResult, Overrides, Trust, set_option


def log(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Runs, and folders of runs.")],
    overrides: Annotated[list[str], set_option("Set a key of the tracker, as in project=mine; repeatable.")],
    to: Annotated[
        Literal["tensorboard", "wandb", "trackio", "mlflow"],
        Option("--to", help="Tracker to write to."),
    ],
) -> CommandResult:
    """Write the metrics of runs to TensorBoard, Weights & Biases, Trackio or MLflow.

    Reads metrics.jsonl; steps are the optimiser steps at the end of each epoch. Run again, it adds only what is new.
    """
    from logitcache.report.export_runs import export_runs

    return CommandResult(asdict(export_runs(runs, to, overrides)), follows=("report", *map(str, runs)))


def card(
    path: Annotated[str, Argument(metavar="CACHE|RUN", help="A cache (folder or URL) or a finished run.")],
    teacher_licences: Annotated[
        list[str],
        Option(
            "--teacher-licence",
            default_factory=list,
            show_default=False,
            metavar="NAME=LICENCE",
            help="Licence of a teacher; repeatable.",
        ),
    ],
    out: Annotated[Path, Option("--out", metavar="FILE", help="File to write.")] = Path("README.md"),
    licence: Annotated[
        str | None, Option("--licence", metavar="NAME", help="Licence of the cache or run, as in apache-2.0.")
    ] = None,
) -> CommandResult:
    """Write a README of a cache or run, for a hub or a shared disk.

    It states what the cache or run records: teachers, views, encodings and their errors, accuracy, and how to use it.
    """
    from logitcache.report.card import parse_licences, write_card

    result = write_card(path, out, licence, parse_licences(teacher_licences))
    return CommandResult(asdict(result), follows=("verify", path))


def report(
    paths: Annotated[
        list[str],
        Argument(metavar="RUN|SWEEP|FILE|CACHE...", help="Runs, folders of runs, exported ONNX files, and caches."),
    ],
    overrides: Overrides,
    trust: Trust,
    out: Annotated[Path, Option("--out", metavar="FILE", help="File to write.")] = Path("report.html"),
    measure: Annotated[
        int, Option("--measure", min=0, metavar="N", help="Run the N best models on their validation images.")
    ] = 8,
    points: Annotated[
        int,
        Option("--points", min=20, metavar="N", help="Number of images for confusion, similarities, PCA and t-SNE."),
    ] = 500,
    latency: Annotated[bool, Option("--latency", help="Also time the models that are run.")] = False,
) -> CommandResult:
    """Write one self-contained HTML page on runs, sweeps, exported files and caches.

    It shows curves, comparisons, calibration, confusion against the teacher, representations, views, encoding errors
    and provenance; every figure has its data as CSV. --measure 0 only reads files and runs no model.
    """
    from logitcache.report.page.report import write_report

    found = write_report(paths, out, overrides, trust, measure=measure, points=points, latency=latency)
    return CommandResult(asdict(found))


def app(
    runs: Annotated[list[Path], Argument(metavar="RUN|FILE...", help="Run folders and exported ONNX files.")],
    overrides: Overrides,
    trust: Trust,
    cache: Annotated[
        str | None,
        Option("--cache", metavar="CACHE", help="Show the cached outputs of its teachers for its images."),
    ] = None,
    online: Annotated[
        bool, Option("--online", help="Load the cache's teachers too, to predict images that it does not have.")
    ] = False,
    top: Annotated[int, Option("--top", min=1, metavar="K", help="Show the K most probable classes.")] = 5,
    host: Annotated[
        str, Option("--host", metavar="HOST", help="Address to listen on; 0.0.0.0 lets other machines use the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        Option(
            "--port",
            min=0,
            max=65535,
            metavar="PORT",
            show_default="the first free from 7860",
            help="Port to listen on; 0 is any.",
        ),
    ] = None,
) -> CommandResult:
    """Serve a page on which students and teachers predict images that you drop.

    It runs until Ctrl-C. Students predict as with the command predict. With --cache, images of its data set are
    recognised by their bytes or pixels, or chosen by index or id, and the page shows the teachers' cached outputs over
    all views, without loading a teacher. --set dataset.root=DIR gives the folder of these images, other keys change the
    runs' recipes.
    """
    from logitcache.report.app.server import Page

    page = Page(runs, cache, host, port, overrides=overrides, trust=trust, online=online, top=top)
    document = {"url": page.url, "runs": [str(run) for run in runs], "cache": cache}
    return CommandResult(document, f"{page.url} (Ctrl-C ends it)\n", serve=page.serve)


def env() -> CommandResult:
    """Show the versions and devices that affect results."""
    from logitcache.report.environment import environment

    return CommandResult(environment(), follows=("demo",))
