"""Results for human eyes: tables on a terminal, aligned text in a pipe."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from logitcache.runtime.console import visible

MISSING = "-"
LONGEST_LIST = 240
LONGEST_TABLE = 40


def as_text(document: Mapping[str, Any]) -> str:
    """Write a result for stdout: scalars as aligned lines, lists of mappings as tables, entries as recipes do."""
    # Without styles: what prints the text shows escape sequences instead of sending them.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, color_system=None)
    with console.capture() as capture:
        _print(console, document)
    return capture.get()


def _print(console: Console, document: Mapping[str, Any]) -> None:
    scalars = dict(_scalars(document))
    width = max(map(len, scalars), default=0)
    for name, value in scalars.items():
        console.print(f"{name:<{width}}  {value}")
    for name, rows in _tables(document):
        console.print()
        _print_table(console, name, rows)


def _scalars(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        name = visible(f"{prefix}{key}", keep="")
        if isinstance(value, Mapping) and not _is_entry(value):
            yield from _scalars(value, f"{name}.")
        elif not _is_table(value):
            # On one line, whatever it holds: a value cannot pass for another, or for an error.
            yield name, visible(_format(str(key), value), keep="")


def _tables(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[dict[str, str]]]]:
    for key, value in document.items():
        if isinstance(value, Mapping) and not _is_entry(value):
            yield from _tables(value, f"{prefix}{key}.")
        elif _is_table(value):
            yield visible(f"{prefix}{key}", keep=""), [dict(_scalars(row)) for row in value]


def _is_entry(value: Any) -> bool:
    """Say whether a value is an entry of a recipe, which names its kind."""
    return isinstance(value, Mapping) and "kind" in value


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and not _is_entry(value[0])


def _print_table(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, MISSING) for name in columns] for row in rows[:LONGEST_TABLE]]
    if len(rows) > LONGEST_TABLE:
        title = f"{title}, the first {LONGEST_TABLE} of {len(rows)} (--json has all)"
    if console.is_terminal:
        table = Table(*columns, title=title, title_justify="left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    console.print(f"{title}:")
    for row in [columns, *cells]:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        console.print(f"  {line.rstrip()}")


def _format(name: str, value: Any) -> str:
    """Write a number with its unit where the name tells it, a list with commas."""
    match value:
        case None:
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return format_bytes(value)
        case int() | float() if name.endswith("seconds"):
            return f"{value:.3g} s"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=math.inf).strip()
        case list() | tuple():
            text = ", ".join(_format("", item) for item in value) or MISSING
            return text if len(text) <= LONGEST_LIST else f"{len(value)} entries"
    return str(value)


def format_bytes(count: int) -> str:
    """Write 12.3 MB: decimal units, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
