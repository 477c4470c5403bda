"""Pareto fronts: quality against cost, and the models that no other beats at both."""

from typing import Any

from logitcache.report.figures.base import COLORS, Figure, FigureRows, draw, log_scale

_MOST_NAMES = 12
_LOG_RANGE = 10


def front(rows: FigureRows, cost: str, quality: str) -> list[int]:
    """Return the rows, by ascending cost, that no other row of at most the cost reaches in quality."""
    best, found = float("-inf"), []
    for number in sorted(range(len(rows)), key=lambda n: (rows[n][cost], -rows[n][quality])):
        if rows[number][quality] > best:
            best = rows[number][quality]
            found.append(number)
    return found


def pareto(
    rows: FigureRows, cost: str, quality: str, name: str = "run", *, title: str = "", caption: str = ""
) -> Figure:
    """Draw `quality` (more is better) over `cost` (less is better); the caption names the members of the front."""
    chosen = front(rows, cost, quality)
    marked = [dict(row) | {"front": number in chosen} for number, row in enumerate(rows)]

    def plot(axes: Any) -> None:
        axes.scatter([r[cost] for r in rows], [r[quality] for r in rows], s=14, color=COLORS[-1], lw=0)
        steps = [rows[number] for number in chosen]
        axes.step(
            [r[cost] for r in steps],
            [r[quality] for r in steps],
            where="post",
            color=COLORS[0],
            marker="o",
            ms=4,
            lw=1.2,
        )
        for number, row in enumerate(steps, 1):
            axes.annotate(
                str(number),
                (row[cost], row[quality]),
                (-3, 3),
                textcoords="offset points",
                fontsize=9,
                ha="right",
                va="bottom",
            )
        costs = [row[cost] for row in rows]
        if min(costs) > 0 and max(costs) > _LOG_RANGE * min(costs):
            log_scale(axes, "x")
        axes.margins(0.12)
        axes.set_xlabel(cost)
        axes.set_ylabel(quality)

    legend = [f"{number} {rows[row][name]}" for number, row in enumerate(chosen[:_MOST_NAMES], 1)]
    legend += [f"and {len(chosen) - _MOST_NAMES} more"] if len(chosen) > _MOST_NAMES else []
    return draw(title or f"{quality} by {cost}", marked, plot, "\n".join(filter(None, [caption, *legend])))
