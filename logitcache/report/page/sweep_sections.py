"""Sections of a report on sweeps: their own tables, as the command prints them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitcache.report import figures
from logitcache.report.page.page import Section, Table
from logitcache.report.page.run_files import RunFiles
from logitcache.sweeps.comparison.table_formats import PERCENT, TITLES, format_table, notes, shown_rows
from logitcache.sweeps.search.trials import TrialResult
from logitcache.sweeps.sweep import SweepResult, read_sweep


def sections_of_sweeps(paths: Sequence[Path], runs: Sequence[RunFiles]) -> Iterator[Section]:
    """Yield the comparison of each sweep at or below paths that has ended; `runs` are all that were found there."""
    by_folder: dict[Path, list[RunFiles]] = {}
    for run in runs:
        by_folder.setdefault(run.path.parent.parent, []).append(run)
    ended = {
        folder: found
        for folder in by_folder
        if any(path in (folder, *folder.parents) for path in paths) and (found := read_sweep(folder)) is not None
    }
    for folder, found in ended.items():
        yield _section(folder, found, by_folder[folder], f" {folder}" if len(ended) > 1 else "")


def _section(folder: Path, found: SweepResult, runs: Sequence[RunFiles], suffix: str) -> Section:
    comparison = found.comparison
    tables = []
    if cells := shown_rows(comparison):
        tables.append(Table("cells", cells, " ".join(notes(comparison)), full_csv=format_table(comparison, "csv")))
    if found.trials:
        tables.append(Table("trials", [_trial(trial) for trial in found.trials]))
    if ended := list(_ended(found, runs)):
        tables.append(Table("ended by halving", ended, "The measures are those of their last epoch."))
    return Section(f"Sweep{suffix}", "\n".join(_texts(folder, found)), list(_differences(found)), tables)


def _trial(trial: TrialResult) -> dict[str, Any]:
    """Return a trial of a search as a row; its values are by objective."""
    shown = {"trial": trial.trial, "cell": trial.cell, "state": trial.state, "epochs": trial.epochs}
    return shown | dict(trial.values) | {"front": "yes" if trial.is_front else "", "reason": trial.reason}


def _texts(folder: Path, found: SweepResult) -> Iterator[str]:
    stopped = f", {len(found.stopped)} ended by halving" if found.stopped else ""
    failed = f", {len(found.failed)} failed" if found.failed else ""
    yield f"{folder}: {found.students} students, {found.finished} finished{stopped}{failed}; {found.orders}."
    yield (
        f"{found.images_rendered} images were rendered for {found.images_trained} that students trained on. Sharing "
        f"saved {found.seconds_saved / 3600:.3g} hours of waiting for batches and {found.bytes_saved / 1e9:.3g} GB of "
        f"answers read; training online would have taken {found.teacher_passes_saved} teacher passes."
    )
    yield from (f"{run} failed: {why.splitlines()[0]}" for run, why in found.failed.items())


def _ended(found: SweepResult, runs: Sequence[RunFiles]) -> Iterator[dict[str, Any]]:
    """Yield the runs that halving ended, with the epochs that they had."""
    for run in runs:
        if run.path.name in found.stopped and run.metrics:
            last = run.metrics[-1]
            measured = {name: last[f"val_{name}"] for name in TITLES if last.get(f"val_{name}") is not None}
            yield {"run": run.path.name, "epochs": len(run.metrics), "of": run.recipe.get("epochs"), **measured}


def _differences(found: SweepResult) -> Iterator[figures.Figure]:
    """Yield the differences from the baseline with their intervals, if there are any."""
    comparison = found.comparison
    if comparison.metric is None or not comparison.comparisons:
        return
    scale = 100 if comparison.metric in PERCENT else 1
    rows = [
        {"cell": row.cell}
        | {key: scale * v if key in ("mean", "deviation", "low", "high") and v is not None else v for key, v in entries}
        for row in comparison.rows
        if row.difference is not None
        for entries in [asdict(row.difference).items()]
    ]
    unit = "percentage points" if scale == 100 else "absolute"
    caption = "Paired by seed; lines are 95 % intervals by Student's t, of three seeds or more."
    title = f"{TITLES[comparison.metric]}, less {comparison.baseline}"
    yield figures.intervals(rows, title=title, label=unit, caption=caption)
