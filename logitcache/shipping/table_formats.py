"""Write a table of models as text, CSV, JSON, Markdown or LaTeX."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from logitcache.runtime.tables import TableFormat, as_csv, as_latex, as_markdown, format_bytes
from logitcache.shipping.model_table import ModelRow, ModelTable
from logitcache.student.evaluation.single_label import Measures


def format_models(table: ModelTable, form: TableFormat) -> str:
    """Return a table in a format; CSV and JSON have every figure, the others a selection."""
    if form == "json":
        return json.dumps(asdict(table), indent=2) + "\n"
    if form == "csv":
        return as_csv([_flat(row) for row in table.models])
    return (as_markdown if form == "markdown" else as_latex)(shown_models(table))


def _flat(row: ModelRow) -> dict[str, Any]:
    flat = asdict(row) | {} if row.measures is None else {**asdict(row), **asdict(row.measures)}
    for each in row.latencies:
        of_batch = f"batch_{each.batch_size}_threads_{each.threads}"
        flat |= {f"seconds_{of_batch}": each.seconds, f"speed_up_{of_batch}": each.speed_up}
    return {key: value for key, value in flat.items() if key not in ("measures", "latencies")}


def shown_models(table: ModelTable) -> list[dict[str, str]]:
    """Return the table as people read it: one mapping of titles to text a model, with the same titles in all."""
    rows = [dict(_shown(row)) for row in table.models]
    titles = dict.fromkeys(title for row in rows for title in row)
    return [{title: row.get(title, "") for title in titles} for row in rows]


def _shown(row: ModelRow) -> Iterator[tuple[str, str]]:
    yield from (("model", row.model), ("parent", row.parent or ""), ("arithmetic", row.arithmetic))
    if row.measures is not None:
        is_single = isinstance(row.measures, Measures)
        yield "top-1, %" if is_single else "mAP, %", _percent(row.measures.quality)
        yield "agreement, %", _percent(row.measures.agreement)
        if isinstance(row.measures, Measures):
            yield "ECE", "" if row.measures.ece is None else f"{row.measures.ece:.4f}"
    yield "parent agreement, %", _percent(row.parent_agreement)
    yield "retention, %", _percent(row.retention)
    yield "parameters", "" if row.num_parameters is None else f"{row.num_parameters}"
    yield "MACs", "" if row.macs is None else f"{row.macs}"
    yield "bytes", "" if row.bytes is None else format_bytes(row.bytes)
    for each in row.latencies:
        of_batch = f"batch {each.batch_size}, {each.threads} thread{'s' * (each.threads > 1)}"
        yield f"ms, {of_batch}", f"{1000 * each.seconds:.3g}"
        yield f"speed-up, {of_batch}", "" if each.speed_up is None else f"{each.speed_up:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
