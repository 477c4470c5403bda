"""Export the metrics of runs to trackers, from their files: a second export adds what is new."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.config.recipe import Component, load_recipe
from logitcache.errors import RecipeError
from logitcache.report.page.run_files import find_runs, read_runs
from logitcache.runtime.console import track
from logitcache.student.trackers import TrackedRun, Tracker
from logitcache.student.trackers.base import write_rows


class _Export(Component):
    to: Tracker


@dataclass(frozen=True)
class TrackerExport:
    """The tracker, and the runs with the number of epochs that it now has of each."""

    to: str
    runs: tuple[dict[str, Any], ...]


def export_runs(paths: Sequence[str | Path], to: str, overrides: Sequence[str] = ()) -> TrackerExport:
    """Write the metrics of runs, and of runs below folders, to a tracker of a kind, each step once.

    `overrides` are keys of the tracker, as in project=mine. Raises RecipeError for a folder without runs.
    """
    tracker = load_recipe({"to": {"kind": to}}, _Export, [f"to.{text}" for text in overrides]).to
    found = {Path(path): find_runs(Path(path).expanduser()) for path in paths}
    for folder, below in found.items():
        if not below:
            raise RecipeError(f"{folder} is no run and no folder of runs. Fix: name the `out:` of a training")
    runs = read_runs(list(dict.fromkeys(run for below in found.values() for run in below)))
    exported: list[dict[str, Any]] = []
    for run in track(runs, f"write to {to}", len(runs), "runs"):
        sink = tracker.opened(TrackedRun(run.path, run.name, run.recipe))
        try:
            write_rows(sink, run.metrics)
        finally:
            sink.close()
        exported.append({"run": str(run.path), "epochs": len(run.metrics)})
    return TrackerExport(to, tuple(exported))
