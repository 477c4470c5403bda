"""Accuracy by class: a line for each class, a dot for each model."""

from typing import Any

import numpy as np

from logitcache.report.figures.base import COLORS, MOST_SERIES, WIDTH, Figure, FigureRows, draw, shortened

MOST_CLASSES = 30


def per_class(
    rows: FigureRows, models: list[str], name: str = "name", *, title: str = "accuracy by class", caption: str = ""
) -> Figure:
    """Draw the columns of `models` for each class, in the order of the first model, its worst classes on top.

    Of more than 30 classes these are the 30 in which the first model is worst; the rows keep all.
    """
    found = sorted((row for row in rows if row.get(models[0]) is not None), key=lambda row: row[models[0]])
    shown = found[:MOST_CLASSES]
    drawn = models[:MOST_SERIES]

    def plot(axes: Any) -> None:
        places = range(len(shown))
        for row, place in zip(shown, places, strict=True):
            known = [row[model] for model in drawn if row.get(model) is not None]
            axes.plot([min(known), max(known)], [place, place], color=COLORS[-1], lw=1, zorder=1)
        for number, model in enumerate(drawn):
            points = [
                (row[model], place) for row, place in zip(shown, places, strict=True) if row.get(model) is not None
            ]
            marker = "D" if number == len(drawn) - 1 and len(drawn) > 1 else "o"
            axes.scatter(
                *np.array(points, np.float64).reshape(-1, 2).T,
                s=20,
                color=COLORS[number],
                marker=marker,
                label=shortened(model),
            )
        axes.set_yticks(places, [shortened(row[name], 18) for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("accuracy")
        axes.figure.legend(loc="outside lower center", handlelength=1, ncols=2)

    size = (WIDTH, 60 + 20 * len(shown) + 8 * len(drawn))
    return draw(title, rows, plot, caption, size)
