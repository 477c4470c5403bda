"""One self-contained HTML page of sections: figures, tables and text. It asks no server for anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from logitcache.errors import needs_extra
from logitcache.report.figures.base import Figure, FigureRows, as_csv
from logitcache.store.files import write_atomically


@dataclass(frozen=True)
class Table:
    """Rows as a table; of more than `most` rows the page shows the first, the CSV all.

    `full_csv` takes the place of the rows' own CSV, if these are rounded for people.
    """

    title: str
    rows: FigureRows
    caption: str = ""
    most: int = 200
    full_csv: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns, in the order in which rows name them."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def csv(self) -> str:
        """The rows as CSV."""
        return as_csv(self.rows) if self.full_csv is None else self.full_csv


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, figures side by side, tables, and long texts that open on demand, by name."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    details: Sequence[tuple[str, str]] = ()

    @property
    def anchor(self) -> str:
        """The name that links lead to."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> int:
    """Write a page, whole or not at all; return its bytes. Raises MissingExtraError without Jinja2."""
    with needs_extra("a page", "report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
    environment = Environment(
        loader=PackageLoader("logitcache.report.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "as_link": lambda text: f"data:text/csv;charset=utf-8,{quote(text, safe=' ,.:/', errors='surrogateescape')}",
    }
    page = environment.get_template("page.html.jinja").render(title=title, lead=lead, sections=sections)
    content = page.encode(errors="surrogateescape")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return len(content)


def shown(value: object) -> str:
    """Format a cell: four digits of a number, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
