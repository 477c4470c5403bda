"""Sections of a report that the files of runs fill: comparison, curves, heat maps, Pareto fronts, provenance."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitcache.report import figures
from logitcache.report.page.page import Section, Table
from logitcache.report.page.run_files import RECIPE, RunFiles, varying
from logitcache.store.safe_files import read_bounded

_MOST_KEYS, _MOST_VALUES = 4, 16
"""Keys that heat maps take two of, those of most values, and values of such a key."""

_MEASURED = ("top1", "best_top1", "mean_ap", "best_mean_ap", "agreement", "loss", "num_parameters", "seconds")
_PLACES_OF_METRICS = ("epoch", "step")
_MOST_RECIPES = 100
_MOST_RUNS = 40


def sections_of_runs(
    runs: Sequence[RunFiles], latencies: Mapping[str, float], is_swept: bool = False
) -> Iterator[Section]:
    """Yield the sections; `latencies` are milliseconds per image of the runs that were timed, by name.

    `is_swept`: the page has the sweep's own comparison over seeds.
    """
    keys = varying(runs)
    best = sorted(runs, key=lambda run: -(run.quality or 0.0))
    tables = [Table("runs", [_row(run, keys, latencies) for run in best], "The best first.", most=_MOST_RUNS)]
    if not is_swept and (seeds := _over_seeds(runs, keys)):
        caption = "Mean and sample standard deviation over seeds."
        tables.append(Table("over seeds", seeds, caption))
    yield Section("Comparison", _differences(runs, keys), _fronts(runs, latencies), tables)
    if maps := list(_heat_maps(runs, keys)):
        yield Section("Heat maps", "Means over all other keys, seeds included.", maps)
    curves, constant = _curves(runs)
    note = f"The same in all epochs of all runs: {', '.join(constant)}." if constant else ""
    yield Section("Curves", note, curves)


def provenance(runs: Sequence[RunFiles]) -> Section:
    """Return what made the runs: versions, identities and recipes."""
    rows = [
        {"run": run.name}
        | {name: str(value) for name, value in (run.versions or [{}])[-1].items()}
        | {"sessions with other versions": max(len(run.versions) - 1, 0)}
        for run in runs
    ]
    learnt = [{"run": run.name, **{key: str(value)[:16] for key, value in run.learns_from.items()}} for run in runs]
    recipes = [
        (f"{run.name}/{RECIPE}", read_bounded(run.path / RECIPE, 1 << 20).decode()) for run in runs[:_MOST_RECIPES]
    ]
    return Section("Provenance", "", (), [Table("versions", rows), Table("learns from", learnt)], recipes)


def _row(run: RunFiles, keys: Sequence[str], latencies: Mapping[str, float]) -> dict[str, Any]:
    epochs = f"{len(run.metrics)} of {run.recipe.get('epochs')}" if not run.result else run.result.get("epochs")
    found = {name: run.result[name] for name in _MEASURED if run.result.get(name) is not None}
    latency = {"latency_ms": latencies[run.name]} if run.name in latencies else {}
    return {"run": run.name, "epochs": epochs, **found, **latency, **{key: run.recipe.get(key) for key in keys}}


def _differences(runs: Sequence[RunFiles], keys: Sequence[str]) -> str:
    unfinished = [run.name for run in runs if not run.result]
    lines = [f"{len(runs)} runs differ in: {', '.join(keys)}." if keys else ""]
    lines += [f"Not finished: {', '.join(unfinished)}." if unfinished else ""]
    return "\n".join(filter(None, lines))


def _over_seeds(runs: Sequence[RunFiles], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each setting of which there are several seeds; none without any."""
    others = [key for key in keys if key != "seed"]
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        if run.result and run.quality is not None:
            groups.setdefault(str([run.recipe.get(key) for key in others]), []).append(run)
    return [
        {
            "seeds": len(members),
            "mean": statistics.mean(found := [run.quality or 0.0 for run in members]),
            "deviation": statistics.stdev(found) if len(found) > 1 else None,
        }
        | {key: members[0].recipe.get(key) for key in others}
        for members in groups.values()
        if len(groups) < len(runs)
    ]


def _fronts(runs: Sequence[RunFiles], latencies: Mapping[str, float]) -> list[figures.Figure]:
    """Return quality against parameters and latency, if more than one value of these is known."""
    known = [run for run in runs if run.quality is not None]
    costs = {
        "parameters": {run.name: run.result["num_parameters"] for run in known if run.result},
        "latency (ms)": latencies,
    }
    found = []
    for cost, of in costs.items():
        rows = [{"run": run.name, cost: of[run.name], "accuracy": run.quality} for run in known if run.name in of]
        if len({row[cost] for row in rows}) > 1:
            found.append(
                figures.pareto(
                    rows,
                    cost,
                    "accuracy",
                    title=f"accuracy by {cost}",
                    caption="No run beats those of the line at both.",
                )
            )
    return found


def _heat_maps(runs: Sequence[RunFiles], keys: Sequence[str]) -> Iterator[figures.Figure]:
    """Yield mean quality of finished runs by each two keys in which they differ."""
    known = [run for run in runs if run.result and run.quality is not None]
    values = {
        key: sorted(
            {run.recipe.get(key) for run in known if not isinstance(run.recipe.get(key), list | dict)}, key=_order
        )
        for key in keys
    }
    usable: list[str] = [key for key in keys if key != "seed" and 1 < len(values[key]) <= _MOST_VALUES]
    chosen = sorted(usable, key=lambda key: -len(values[key]))[:_MOST_KEYS]
    usable = [key for key in usable if key in chosen]
    for x, y in itertools.combinations(usable, 2):
        cells = itertools.product(values[y], values[x])
        rows: list[dict[str, Any]] = []
        for row, column in cells:
            found = [run.quality for run in known if (run.recipe.get(x), run.recipe.get(y)) == (column, row)]
            mean = statistics.mean(value for value in found if value is not None) if found else None
            rows.append({x: column, y: row, "accuracy": mean, "runs": len(found)})
        if sum(row["runs"] > 0 for row in rows) > max(len(values[x]), len(values[y])):
            yield figures.heat_map(rows, x, y, "accuracy", title=f"accuracy by {x} and {y}", form="{:.3f}")


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _curves(runs: Sequence[RunFiles]) -> tuple[list[figures.Figure], list[str]]:
    """Return a figure for each metric that changes, what was validated first, and the names of those that do not."""
    rows = [{"run": run.name, **row, "epoch": row["epoch"] + 1} for run in runs for row in run.metrics]
    names = [
        name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("run", *_PLACES_OF_METRICS)
    ]
    names.sort(key=lambda name: (not name.startswith("val_"), not name.startswith("loss")))
    drawn, constant = [], []
    for name in names:
        own = [{key: row[key] for key in ("run", "epoch", name)} for row in rows if row.get(name) is not None]
        found = {row[name] for row in own}
        if len(found) > 1:
            drawn.append(figures.curves(own, name, title=name.replace("val_", "validation ")))
        else:
            constant += [f"{name} {value:g}" for value in found]
    return drawn, constant
