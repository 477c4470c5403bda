"""Intervals: a difference for each row, with the interval that its mean lies in."""

from typing import Any

from logitcache.report.figures.base import COLORS, WIDTH, Figure, FigureRows, draw, shortened

MOST_ROWS = 40
_LONGEST, _FREE = 48, 20
"""Characters of a name, and those for which a figure of the usual width has room."""


def intervals(
    rows: FigureRows, name: str = "cell", *, title: str = "differences", label: str = "difference", caption: str = ""
) -> Figure:
    """Draw column `mean` of each row and, if they are not None, the interval from `low` to `high`; zero is a line.

    Of more than 40 rows these are the 20 highest and the 20 lowest; the rows keep all.
    """
    ordered = sorted((row for row in rows if row.get("mean") is not None), key=lambda row: -row["mean"])
    half = MOST_ROWS // 2
    shown = ordered if len(ordered) <= MOST_ROWS else [*ordered[:half], *ordered[-half:]]
    longest = max((len(shortened(row[name], _LONGEST)) for row in shown), default=0)
    width = WIDTH + 6 * max(0, longest - _FREE)

    def plot(axes: Any) -> None:
        axes.axvline(0, color=COLORS[-1], lw=1)
        for place, row in enumerate(shown):
            if row.get("low") is not None and row.get("high") is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=COLORS[0], lw=1.6, solid_capstyle="butt")
            axes.plot([row["mean"]], [place], "o", color=COLORS[0], ms=4)
        axes.set_yticks(range(len(shown)), [shortened(row[name], _LONGEST) for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(label)

    return draw(title, rows, plot, caption, (width, 60 + 18 * max(len(shown), 2)))
