"""What the files of training runs tell without running a model."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.config.recipe import read_recipe
from logitcache.store.safe_files import parse_json, read_bounded
from logitcache.student.runs.run_directory import RunDirectory

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
_MOST_BYTES = 64 << 20
_DEEPEST = 4
"""Folders below one that holds runs, as of a sweep."""

_PLACES = ("out", "device", "num_workers", "start_method", "checkpoint_steps", "trust")
"""Keys in which runs differ without being other runs."""


@dataclass(frozen=True)
class RunFiles:
    """A run's name on the page, its recipe by dotted key, its metrics, and what it measured, if it has finished."""

    path: Path
    name: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    environment: dict[str, Any]

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
    return [
        RunFiles(
            path,
            os.path.relpath(path.absolute(), common),
            dict(_flat(read_recipe(path / RECIPE))),
            [_parsed(path / METRICS, line) for line in _read(path / METRICS).splitlines()],
            _parsed(path / "result.json", _read(path / "result.json") or b"{}"),
            _parsed(path / "environment.json", _read(path / "environment.json") or b"{}"),
        )
        for path in paths
    ]


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _MOST_BYTES)
    except FileNotFoundError:
        return b""


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """Return the JSON object of a run's file. Raises CacheError for what is none."""
    with RunDirectory(str(path.parent)).reading(path):
        found = parse_json(text)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    return found


def varying(runs: Sequence[RunFiles]) -> list[str]:
    """Return the keys of recipes in which runs differ, but for places and speed."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    return [
        key
        for key in keys
        if key.split(".")[0] not in _PLACES and len({json.dumps(run.recipe.get(key)) for run in runs}) > 1
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield key, value
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))
