"""Embeddings: points of a plane, coloured by class."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.report.figures.base import Figure, FigureRows, draw, shortened

_MOST_NAMES = 12
_MOST_VECTORS = 5000
"""Classes that are named at the middle of their points, and points that are drawn as vectors."""


def embedding(rows: FigureRows, *, title: str = "embedding", caption: str = "", label: str = "class") -> Figure:
    """Draw points at columns `x` and `y`, coloured by `label`; the axes of such maps have no unit."""
    labels = list(dict.fromkeys(sorted((row[label] for row in rows), key=str)))
    places = np.array([(row["x"], row["y"]) for row in rows], dtype=np.float64).reshape(-1, 2)
    numbers = np.array([labels.index(row[label]) for row in rows])

    def plot(axes: Any) -> None:
        import matplotlib

        colors = matplotlib.colormaps["tab20"](numbers % 20)
        axes.scatter(*places.T, s=9, c=colors, lw=0, alpha=0.85, rasterized=len(rows) > _MOST_VECTORS)
        if len(labels) <= _MOST_NAMES:
            middles = np.array([np.median(places[numbers == number], axis=0) for number in range(len(labels))])
            for name, (x, y) in zip(labels, _apart(middles, np.ptp(places, axis=0)), strict=True):
                axes.text(x, y, shortened(name, 14), fontsize=9, ha="center", va="center", weight="bold")
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.grid(False)

    return draw(title, rows, plot, caption, (340, 320))


def _apart(middles: NDArray[np.float64], extent: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move names up, from the lowest on, until none covers another."""
    width, height = 0.24 * extent[0], 0.045 * extent[1]
    moved = middles.copy()
    order = np.argsort(middles[:, 1])
    for number, own in enumerate(order):
        for other in order[:number]:
            near = abs(moved[own] - moved[other]) < (width, height)
            if near.all():
                moved[own, 1] = moved[other, 1] + height
    return moved
