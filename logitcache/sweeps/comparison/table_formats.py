"""Write a comparison as CSV, JSON, Markdown or LaTeX."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from logitcache.runtime.tables import TableFormat, as_csv, as_latex, as_markdown
from logitcache.sweeps.comparison.comparison import Comparison, Difference, Row, Spread
from logitcache.sweeps.search.trials import TrialResult

PERCENT = frozenset({"top1", "best_top1", "mean_ap", "best_mean_ap", "f1_macro", "agreement"})
"""Measures that are fractions, and read as percentages."""

TITLES = {
    "top1": "top-1, last epoch",
    "best_top1": "top-1, best epoch",
    "mean_ap": "mAP, last epoch",
    "best_mean_ap": "mAP, best epoch",
    "f1_macro": "macro F1",
    "agreement": "agreement",
    "loss": "loss",
}


_OBJECTIVES = {
    "accuracy": ("accuracy, %", 100),
    "agreement": ("agreement, %", 100),
    "latency": ("latency, ms", 1000),
    "parameters": ("parameters", 1),
    "flops": ("MFLOP", 1e-6),
}
"""Title and factor of each objective."""


def format_table(comparison: Comparison, form: TableFormat) -> str:
    """Return a comparison in a format; CSV and JSON have every column, the others a selection."""
    return _FORMATS[form](comparison)


def shown_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Return the table as people read it: one mapping of titles to text a cell."""
    measures = [name for name in TITLES if any(name in row.measures for row in comparison.rows)]
    has_error = any(row.target_error is not None for row in comparison.rows)
    return [_shown(row, comparison, measures, has_error) for row in comparison.rows]


def shown_trials(trials: Sequence[TrialResult]) -> list[dict[str, str]]:
    """Return the trials of a search as people read them: one mapping of titles to text a trial."""
    return [
        {"trial": trial.cell, "state": trial.state, "epochs": str(trial.epochs)}
        | {_OBJECTIVES[name][0]: f"{_OBJECTIVES[name][1] * value:.4g}" for name, value in trial.values.items()}
        | {"front": "front" if trial.is_front else ""}
        for trial in trials
    ]


def _shown(row: Row, comparison: Comparison, measures: list[str], has_error: bool) -> dict[str, str]:
    shown = {"cell": row.cell, "seeds": str(row.seeds)}
    if has_error:
        shown["target error"] = "" if row.target_error is None else f"{row.target_error:.2g}"
    shown |= {TITLES[name]: _spread(row.measures.get(name), name in PERCENT) for name in measures}
    if comparison.comparisons:
        assert comparison.metric is not None
        shown |= _difference(row, comparison, comparison.metric in PERCENT)
    return shown


def _spread(spread: Spread | None, percent: bool) -> str:
    if spread is None:
        return ""
    scale, digits = (100, 2) if percent else (1, 4)
    deviation = "" if spread.deviation is None else f" ± {scale * spread.deviation:.{digits}f}"
    return f"{scale * spread.mean:.{digits}f}{deviation}"


def _difference(row: Row, comparison: Comparison, percent: bool) -> dict[str, str]:
    found = row.difference
    scale, digits = (100, 2) if percent else (1, 4)
    title = f"less {comparison.baseline}"
    if found is None:
        return {title: "baseline" if row.cell == comparison.baseline else "", "95 %": "", "p": "", "p (Holm)": ""}
    deviation = "" if found.deviation is None else f" ± {scale * found.deviation:.{digits}f}"
    interval = (
        ""
        if found.low is None or found.high is None
        else f"{scale * found.low:+.{digits}f} to {scale * found.high:+.{digits}f}"
    )
    p, corrected = ("" if value is None else f"{value:.2g}" for value in (found.p, found.p_holm))
    return {title: f"{scale * found.mean:+.{digits}f}{deviation}", "95 %": interval, "p": p, "p (Holm)": corrected}


def _csv(comparison: Comparison) -> str:
    return as_csv([_flat(row) for row in comparison.rows])


def _flat(row: Row) -> dict[str, object]:
    flat: dict[str, object] = {"cell": row.cell, "seeds": row.seeds, "target_error": row.target_error}
    for name, spread in row.measures.items():
        flat |= {f"{name}_mean": spread.mean, f"{name}_deviation": spread.deviation}
    differences = asdict(row.difference) if row.difference else dict.fromkeys(Difference.__dataclass_fields__)
    return flat | {f"difference_{key}": value for key, value in differences.items()}


def _json(comparison: Comparison) -> str:
    return json.dumps(asdict(comparison), indent=2) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """State how cells were compared."""
    if not comparison.comparisons:
        return []
    assert comparison.metric is not None
    return [
        f"Differences in {TITLES[comparison.metric]} from {comparison.baseline}, seed by seed, ± their deviation; "
        "95 % intervals by Student's t, of three seeds or more; p of the paired t-test, and Holm's correction for "
        f"{comparison.comparisons} comparisons."
    ]


_FORMATS: dict[TableFormat, Callable[[Comparison], str]] = {
    "csv": _csv,
    "json": _json,
    "markdown": lambda comparison: as_markdown(shown_rows(comparison), notes(comparison)),
    "latex": lambda comparison: as_latex(shown_rows(comparison), notes(comparison)),
}
