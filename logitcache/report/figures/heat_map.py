"""Heat maps: a number for each pair of a row and a column, as of sweeps, confusions and similarities."""

from typing import Any

import numpy as np

from logitcache.report.figures.base import HEIGHT, WIDTH, Figure, FigureRows, draw, shortened

_MOST_NUMBERS = 12
"""Columns up to which the cells show their numbers."""


def heat_map(
    rows: FigureRows, x: str, y: str, value: str, *, title: str = "", caption: str = "", form: str = "{:.2f}"
) -> Figure:
    """Color column `value` by columns `x` and `y`, in the order of the rows; pairs without a row stay empty."""
    columns = list(dict.fromkeys(row[x] for row in rows))
    lines = list(dict.fromkeys(row[y] for row in rows))
    table = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        table[lines.index(row[y]), columns.index(row[x])] = np.nan if row[value] is None else row[value]
    size = (max(WIDTH, 130 + 30 * len(columns)), max(HEIGHT, 110 + 26 * len(lines)))

    def plot(axes: Any) -> None:
        axes.grid(False)
        axes.imshow(np.ma.masked_invalid(table), cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(columns)), [shortened(name, 16) for name in columns], rotation=45, ha="right")
        axes.set_yticks(range(len(lines)), [shortened(name, 16) for name in lines])
        axes.set_xlabel(x if x != "x" else "")
        axes.set_ylabel(y if y != "y" else "")
        low, high = (np.nanmin(table), np.nanmax(table)) if np.isfinite(table).any() else (0.0, 0.0)
        for line, column in np.argwhere(np.isfinite(table)) if len(columns) <= _MOST_NUMBERS else ():
            number = table[line, column]
            dark = number < low + 0.6 * (high - low)
            axes.text(
                column,
                line,
                form.format(number),
                ha="center",
                va="center",
                fontsize=9,
                color="#fff" if dark else "#000",
            )

    return draw(title or f"{value} by {x} and {y}", rows, plot, caption, size)
