"""Curves: a number over epochs (or views, or temperatures), a line for each series."""

from typing import Any

from logitcache.report.figures.base import COLORS, MOST_SERIES, Figure, FigureRows, draw, log_scale, shortened

_MOST_POINTS = 200
"""Points that are drawn of a line; the rows keep all."""


def curves(
    rows: FigureRows,
    y: str,
    x: str = "epoch",
    series: str = "run",
    *,
    title: str = "",
    caption: str = "",
    log: bool = False,
) -> Figure:
    """Draw column `y` over column `x`, a line for each value of `series`.

    Of more series than colours, lines are shaded by their last value, and the highest and lowest are named.
    """
    lines: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(y) is not None:
            lines.setdefault(row[series], []).append((row[x], row[y]))

    def plot(axes: Any) -> None:
        last = sorted(lines, key=lambda name: lines[name][-1][1])
        for number, (name, points) in enumerate(lines.items()):
            step = -(-len(points) // _MOST_POINTS)
            shown = [*points[:-1:step], points[-1]]
            color: Any = COLORS[number % MOST_SERIES]
            if len(lines) > MOST_SERIES:
                import matplotlib

                color = matplotlib.colormaps["viridis"](last.index(name) / (len(lines) - 1))
            named = len(lines) <= MOST_SERIES or name in (last[0], last[-1])
            marker = "o" if len(points) == 1 else None
            axes.plot(
                *zip(*shown, strict=True),
                color=color,
                lw=1.3 if len(lines) <= MOST_SERIES else 0.8,
                marker=marker,
                ms=3,
                label=shortened(name, 36) if named else None,
            )
        axes.set_xlabel(x)
        axes.xaxis.get_major_locator().set_params(integer=all(isinstance(row[x], int) for row in rows))
        if log:
            log_scale(axes, "y")
        axes.legend(loc="best", handlelength=1.2)

    return draw(title or y, rows, plot, caption)
