"""What three large caches cost: the tables of docs/explanation/scale.md.

    python benchmarks/scale_tables.py [--json]

Files, requests and the bytes of hot arrays are exact. What is assumed, and what was measured elsewhere, is in
scale_model.py. Nothing is measured here.
"""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import scale_model as model
from _harness import parser_of
from scale_model import SCENARIOS, Case, case_of, every_case, seconds_on

from logitcache.planning.costs import memory_of, requests_of_writing
from logitcache.report.inspect import LOOKED_AT
from logitcache.store.remote.client import REQUESTS

GPUS = (8, 64, 1024)

Table = tuple[str, list[dict[str, Any]]]


def stored() -> Table:
    """What is stored."""
    return "What is stored", [
        {
            "cache": case.scenario.name,
            "encoding": case.form,
            "row-views": f"{case.rows / 1e9:.2f} × 10⁹",
            "bytes a row-view": f"{case.store.bytes_per_row:,.1f}",
            "bytes": size(case.store.bytes),
            "`shard_rows`": f"{case.manifest.shard_rows:,}",
            "shards": f"{case.layout.num_shards:,}",
            "files": f"{case.store.files:,}",
            "in one folder": f"{max(array.files for array in case.store.arrays):,}",
        }
        for case in every_case()
    ]


def timed() -> Table:
    """Time and money of the GPUs."""
    cases = [case_of(scenario, "packed top-10") for scenario in SCENARIOS]
    return "Time and money of stage one", [_timed(case, gpus) for case in cases for gpus in GPUS]


def _timed(case: Case, gpus: int) -> dict[str, str]:
    seconds = seconds_on(case, gpus)
    hours = gpus * seconds / 3600
    return {
        "cache": case.scenario.name,
        "GPUs": f"{gpus:,}",
        "shards of a GPU": f"{math.ceil(case.layout.num_shards / gpus):,}",
        "hours": f"{seconds / 3600:.3g}",
        "GPU hours": f"{hours:,.0f}",
        "of them the teacher's": f"{100 * case.rows / model.TEACHER_RATE / 3600 / hours:.0f} %",
        "USD": f"{hours * model.USD_GPU_HOUR:,.0f}",
        "written, MB/s": f"{case.store.bytes / seconds / 1e6:,.1f}",
        "PUTs/s": f"{case.store.files / seconds:.2g}",
    }


def requested() -> Table:
    """Requests and money of object storage."""
    rows = []
    for case in every_case():
        writing, opening = (
            requests_of_writing(case.store, case.layout),
            model.requests_of_opening(case.store, case.layout),
        )
        view = model.requests_of_a_view(case.store, case.layout)
        gets = opening.gets + case.scenario.views * view.gets
        rows.append(
            {
                "cache": case.scenario.name,
                "encoding": case.form,
                "`shard_rows`": f"{case.manifest.shard_rows:,}",
                "PUTs": f"{writing.puts:,}",
                "USD to write": money(dollars(writing.puts + writing.lists, writing.gets)),
                "GETs to open": f"{opening.gets:,}",
                "seconds for it": f"{opening.gets / REQUESTS * model.LATENCY:,.0f}",
                "GETs a view": f"{view.gets:,}",
                "USD to read all": money(dollars(opening.lists, gets)),
                "USD a month": money(case.store.bytes / 1e9 * model.USD_GB_MONTH),
            }
        )
    return "Requests and money of object storage", rows


def met() -> Table:
    """What one process meets: memory at its peak, and CPU time."""
    cases = [case_of(scenario, "packed top-10") for scenario in SCENARIOS]
    rows: dict[str, list[str]] = {}
    for case in cases:
        for what, found in _met(case).items():
            rows.setdefault(what, []).append(found)
    names = [case.scenario.name for case in cases]
    return "What one process meets, packed top-10", [
        {"what": what, **dict(zip(names, found, strict=True))} for what, found in rows.items()
    ]


def _met(case: Case) -> dict[str, str]:
    images, layout, store = case.scenario.images, case.layout, case.store
    looked_at = min(images * case.scenario.classes, LOOKED_AT)
    memory = memory_of(layout, store, model.PIXELS, model.BATCH, model.WORKERS, model.VIEWS_PER_IMAGE)
    files = sum(array.files for array in store.arrays)
    hot = case_of(case.scenario, "top-100")
    mapped = sum(array.files for array in hot.store.arrays if array.storage == "hot") // case.scenario.views
    return {
        "stage one: shards and batches": size(memory.total),
        "stage one on Dask: client and scheduler": both(layout.num_shards, model.TASK_BYTES, model.TASK_SECONDS),
        "images as files: index, at first": both(images, model.FOLDER_BYTES, model.FOLDER_SECONDS),
        "images as files: index, again": both(images, model.FOLDER_AGAIN_BYTES, model.FOLDER_AGAIN_SECONDS),
        "the same, once for all processes that render": size(model.FOLDER_SHARED_BYTES * images),
        "images in tar shards: index": size(model.TAR_BYTES * images),
        "once for all processes that render": size(model.TAR_SHARED_BYTES * images),
        "opening: labels and digests compared": both(images, model.SKELETON_BYTES, model.SKELETON_SECONDS),
        "labels in a student": size(model.LABELS_BYTES * images),
        "all shards compared, once by machine": clock(model.COMPARE_SECONDS * store.bytes),
        "the same again": clock(model.AGAIN_SECONDS * files),
        "`inspect`, which looks at some of view 0": clock(model.INSPECT_SECONDS * looked_at),
        "order of an epoch": both(images, model.SHUFFLE_BYTES, model.ORDER_SECONDS),
        "order of an epoch that mixes": size(model.MIXED_BYTES * images),
        "order of an epoch in blocks (`shuffle_block`)": size(model.BLOCKED_MB * 1e6),
        "files mapped for a view of top-100": f"{mapped:,} of {model.MAPPINGS:,}",
        "the same for all views": f"{mapped * case.scenario.views:,} of {model.MAPPINGS:,}",
    }


def both(count: int, each_bytes: float, each_seconds: float) -> str:
    """Write the memory and the CPU time of so many."""
    return f"{size(count * each_bytes)}, {clock(count * each_seconds)}"


def clock(seconds: float) -> str:
    """Write a time in its unit."""
    units = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
    unit, name = next((unit, name) for least, unit, name in units if seconds >= least)
    return f"{seconds / unit:.3g} {name}"


def assumed() -> Table:
    """What is assumed."""
    values = {
        "teacher, images/s on one GPU": f"{model.TEACHER_RATE:,.0f}",
        "rendering, images/s in one process": f"{model.RENDER_RATE:,.0f}",
        "processes that render, and cores, by GPU": f"{model.WORKERS}, {model.CORES}",
        "encoding and copying a row-view": f"{model.KEEP_SECONDS * 1e6:.0f} µs",
        "compressing a packed row-view, in a thread": f"{model.PACK_SECONDS * 1e6:.0f} µs",
        "packed top-10, bytes a row-view of falls and tail": f"{model.FALL_BYTES + model.TAIL_BYTES:.2f}",
        "answer of object storage": f"{model.LATENCY * 1e3:.0f} ms, {REQUESTS} at a time",
        "USD: GPU hour, GB and month": f"{model.USD_GPU_HOUR}, {model.USD_GB_MONTH}",
        "USD: 1,000 PUTs or LISTs, 1,000 GETs": f"{model.USD_1000_PUTS}, {model.USD_1000_GETS}",
    }
    return f"Assumed on {model.DATE}", [{"what": what, "value": value} for what, value in values.items()]


def dollars(puts: int, gets: int) -> float:
    """Return the price of requests; lists cost what puts cost."""
    return puts / 1000 * model.USD_1000_PUTS + gets / 1000 * model.USD_1000_GETS


def size(count: float) -> str:
    """Write bytes with three digits, in powers of 1000."""
    power = min(5, int(math.log10(max(1, count)) / 3 + 1e-9))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def money(usd: float) -> str:
    """Write dollars: cents where there are few."""
    return f"{usd:,.2f}" if usd < 100 else f"{usd:,.0f}"


def tables() -> Iterator[Table]:
    """Yield every table: its title, and its rows."""
    yield assumed()
    yield stored()
    yield timed()
    yield requested()
    yield met()


def markdown(rows: list[dict[str, Any]]) -> str:
    """Write a table: names left, figures right."""
    names = list(rows[0])
    rule = [("---" if name in ("cache", "encoding", "what") else "--:") for name in names]
    lines = [names, rule, *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Print the tables."""
    arguments = parser_of(__doc__, "changes nothing, as nothing is measured").parse_args()
    found = list(tables())
    if arguments.json:
        print(json.dumps(dict(found), indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
