"""Results as text: tables on a terminal, aligned columns in a pipe, CSV, Markdown, LaTeX."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from logitcache.runtime.console import visible

if TYPE_CHECKING:
    from rich.console import Console

TableFormat = Literal["csv", "json", "markdown", "latex"]

MISSING = "-"
LONGEST_LIST = 240
LONGEST_TABLE = 40


def as_text(document: Mapping[str, Any]) -> str:
    """Format a result: scalars as aligned lines, lists of mappings as tables, entries of recipes as YAML."""
    from rich.console import Console  # here, as every `--help` imports this module

    # Without styles: escape sequences would be shown, not sent.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, color_system=None)
    with console.capture() as capture:
        _print(console, document)
    return capture.get()


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as CSV, with the columns in the order in which rows name them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> str:
    """Format rows of the same columns as a table of Markdown, with notes below it; nothing without rows."""
    if not rows:
        return ""
    texts = [f"| {' | '.join(line)} |" for line in (list(rows[0]), *(list(row.values()) for row in rows))]
    return "\n".join([texts[0], f"|{'---|' * len(rows[0])}", *texts[1:], "", *notes]) + "\n"


def as_latex(rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> str:
    """Format rows of the same columns as a table of LaTeX, with notes as comments; nothing without rows."""
    if not rows:
        return ""
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (list(rows[0]), *(list(r.values()) for r in rows))]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    return "\n".join([*(f"% {note}" for note in notes), begin, *body, r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    """Escape what LaTeX obeys."""
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash " if character == "\\" else f"\\{character}")
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")


def _print(console: "Console", document: Mapping[str, Any]) -> None:
    scalars = _scalars(document)
    width = max(map(len, scalars), default=0)
    for name, value in scalars.items():
        console.print(f"{name:<{width}}  {value}")
    for name, value in _leaves(document):
        if _is_table(value):
            console.print()
            _print_table(console, visible(name, keep=""), [_scalars(row) for row in value])


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted name; entries of a recipe are values."""
    for key, value in document.items():
        if isinstance(value, Mapping) and not _is_entry(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _scalars(document: Mapping[str, Any]) -> dict[str, str]:
    """Return all values but tables, each on one line: none can pass for another, or for an error."""
    leaves = ((name, value) for name, value in _leaves(document) if not _is_table(value))
    return {visible(name, keep=""): visible(_format(name, value), keep="") for name, value in leaves}


def _is_entry(value: Any) -> bool:
    """Return whether a value is an entry of a recipe, which names its kind."""
    return isinstance(value, Mapping) and "kind" in value


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and not _is_entry(value[0])


def _print_table(console: "Console", title: str, rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, MISSING) for name in columns] for row in rows[:LONGEST_TABLE]]
    if len(rows) > LONGEST_TABLE:
        title = f"{title}, the first {LONGEST_TABLE} of {len(rows)} (--json has all)"
    if console.is_terminal:
        from rich.table import Table

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
    """Format a number with the unit in its name, a list with commas."""
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
            import yaml

            entry = {key: _shortened(item) for key, item in value.items()}
            return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        case [least, most] if name.endswith("seconds"):
            return " to ".join(dict.fromkeys((_format(name, least), _format(name, most))))
        case list() | tuple():
            text = ", ".join(_format("", item) for item in value) or MISSING
            return text if len(text) <= LONGEST_LIST else f"{len(value)} entries"
    return str(value)


def _shortened(value: Any) -> Any:
    """Return an argument of an entry, with the number of its items for those of a long list."""
    match value:
        case Mapping() if len(value) <= LONGEST_LIST:
            return {key: _shortened(item) for key, item in value.items()}
        case list() | tuple() if len(value) <= LONGEST_LIST:
            return [_shortened(item) for item in value]
        case Mapping() | list() | tuple():
            return f"{len(value)} entries"
    return value


def format_bytes(count: int) -> str:
    """Format as 12.3 MB: decimal units, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
