"""Reliability diagrams: accuracy by confidence."""

from typing import Any

from logitcache.report.figures.base import COLORS, MOST_SERIES, Figure, FigureRows, draw, shortened


def reliability(rows: FigureRows, model: str = "model", *, title: str = "reliability", caption: str = "") -> Figure:
    """Draw `accuracy` over `confidence` of each bin, sized by its share of `images`, a line for each `model`.

    Guo et al., "On calibration of modern neural networks" (ICML 2017): on the diagonal a model is as often right as it
    is sure; below it is too sure.
    """
    lines: dict[Any, list[Any]] = {}
    for row in rows:
        if row["images"]:
            lines.setdefault(row[model], []).append(row)

    def plot(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=COLORS[-1], lw=0.8, ls=(0, (4, 3)))
        for number, (name, bins) in enumerate(list(lines.items())[:MOST_SERIES]):
            x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
            most = max(row["images"] for row in bins)
            axes.plot(x, y, color=COLORS[number], lw=1, label=shortened(name))
            axes.scatter(x, y, s=[4 + 36 * row["images"] / most for row in bins], color=COLORS[number], lw=0)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.legend(loc="upper left", handlelength=1)

    return draw(title, rows, plot, caption, (340, 300))
