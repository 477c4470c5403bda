"""Read the files of training runs, without running a model."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logitcache.config.recipe import read_recipe
from logitcache.config.yaml_text import flattened
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import RunResult

RECIPE = "recipe.yaml"
_DEEPEST = 4
"""Folders below one that holds runs, as of a sweep."""

_PLACES = ("out", "device", "num_workers", "start_method", "checkpoint_steps", "trust")
"""Keys in which runs differ without being other runs."""


@dataclass(frozen=True)
class RunFiles:
    """A run's name on the page, its recipe by dotted key, its metrics, and its result if it has finished.

    `versions` are those of each session, `learns_from` identifies the data.
    """

    path: Path
    name: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    versions: list[dict[str, str]]
    learns_from: dict[str, Any]

    @property
    def quality(self) -> float | None:
        """Top-1, else mean average precision, of the kept weights; None if nothing was measured."""
        found = self.result or {key.removeprefix("val_"): value for key, value in (self.metrics or [{}])[-1].items()}
        return found.get("top1") if found.get("top1") is not None else found.get("mean_ap")


def is_run(path: Path) -> bool:
    """Return whether a folder is of a run that has begun."""
    return (path / RECIPE).is_file() and (path / "environment.json").is_file()


def find_runs(folder: Path) -> list[Path]:
    """Return a folder that is a run, or the runs below it, as of a sweep, in order of their names."""
    if is_run(folder):
        return [folder]
    top = len(folder.parts)
    found = []
    for place, folders, _ in os.walk(folder):
        if is_run(Path(place)):
            found.append(Path(place))
        folders[:] = [] if found[-1:] == [Path(place)] or len(Path(place).parts) - top >= _DEEPEST else sorted(folders)
    return found


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read runs; those without a finished epoch have no metrics. Raises CacheError for a file that is damaged."""
    common = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return [_read(path, os.path.relpath(path.absolute(), common)) for path in paths]


def _read(path: Path, name: str) -> RunFiles:
    run = RunDirectory(str(path))
    result, environment = run.finished(RunResult), run.environment()
    return RunFiles(
        path,
        name,
        dict(flattened(read_recipe(path / RECIPE))),
        run.recorded(),
        {} if result is None else asdict(result),
        environment.versions,
        environment.learns_from,
    )


def varying(runs: Sequence[RunFiles]) -> list[str]:
    """Return the keys of recipes in which runs differ, but for places, speed and what another `kind` implies."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    found = {key: {json.dumps(run.recipe[key]) for run in runs if key in run.recipe} for key in keys}
    lacking = {key for key in keys if any(key not in run.recipe for run in runs)}
    differ = [key for key in keys if key.split(".")[0] not in _PLACES and len(found[key]) + (key in lacking) > 1]
    kinds = {key.removesuffix("kind") for key in differ if key.endswith(".kind")}

    def is_implied(key: str) -> bool:
        own = key.rpartition(".")[0] + "."
        return key in lacking and len(found[key]) == 1 and own in kinds and not key.endswith(".kind")

    return [key for key in differ if not is_implied(key)]
