"""`Figure`, and `draw`, which turns a plot on matplotlib's axes into one."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from logitcache.errors import needs_extra
from logitcache.runtime import tables

FigureRows = Sequence[Mapping[str, Any]]

COLORS = ("#3d85c6", "#dd7a34", "#2e9e6b", "#c65180", "#8d70d6", "#ab9420", "#38a7b0", "#8c8c8c")
"""Colours of series, distinct on white, on black and with red-green colour blindness."""

MOST_SERIES = len(COLORS)
WIDTH, HEIGHT = 340, 240
"""Pixels of a figure: it fits on a telephone."""

_INK, _RULE = "#010203", "#040506"
_INHERITED = {_INK: "currentColor", _RULE: "var(--rule, #8888)"}
"""Colours that stand for those of the page."""

_STYLE = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _RULE,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.4,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Figure:
    """An SVG with the rows that it shows; notebooks display it."""

    title: str
    svg: str
    rows: FigureRows
    caption: str = ""

    @property
    def csv(self) -> str:
        """The rows as CSV."""
        return as_csv(self.rows)

    def _repr_svg_(self) -> str:
        return self.svg


def as_csv(rows: FigureRows) -> str:
    """Format rows as CSV, numbers with six digits."""
    return tables.as_csv(
        [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    )


def draw(
    title: str,
    rows: FigureRows,
    plot: Callable[[Any], None],
    caption: str = "",
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Figure:
    """Plot on axes of a size in pixels; the same rows give the same bytes. Raises MissingExtraError."""
    with needs_extra("a figure", "report"):
        import matplotlib.style
        from matplotlib.figure import Figure as Canvas
    salt = hashlib.sha256(f"{title}{size}{list(rows)}".encode()).hexdigest()
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": salt}]):
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the fonts
        canvas = Canvas((size[0] / 72, size[1] / 72), layout="constrained")
        axes = canvas.subplots()
        plot(axes)
        unset = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", metadata=unset)
    return Figure(title, _inline(buffer.getvalue(), title, size), rows, caption)


def _inline(svg: str, title: str, size: tuple[int, int]) -> str:
    """Prepare an SVG for the inside of a page: its colours inherited, nothing of it that reaches beyond it."""
    content = re.sub(r"<(metadata|style)\b.*?</\1>|<defs>\s*</defs>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    content = content[content.index(">") + 1 :]
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", content))
    content = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", content)
    for color, inherited in _INHERITED.items():
        content = content.replace(color, inherited)
    return opened(title, *size) + re.sub(r"\n\s*", "\n", content)


def log_scale(axes: Any, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def opened(title: str, width: int, height: int) -> str:
    """Return the opening tag of an SVG of a size in pixels."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(title)}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    )


def shortened(text: object, length: int = 22) -> str:
    """Shorten a name in the middle: both its ends distinguish names. Bytes of it that are no UTF-8 become `?`."""
    name = str(text).encode(errors="replace").decode()  # matplotlib refuses surrogates
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
