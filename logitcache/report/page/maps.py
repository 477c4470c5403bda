"""Representations of the same images side by side: similarity, shared neighbours, and maps of the plane."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.errors import needs_extra
from logitcache.report import figures
from logitcache.report.page.measured import Matrix
from logitcache.student.evaluation.alignment import LinearCKA

NEIGHBOURS = 10
_PERPLEXITY = 30
_MOST_COMPARED, _MOST_MAPS = 24, 9
"""Representations that are compared with one another, and drawn as maps."""


def cka(x: Matrix, y: Matrix) -> float | None:
    """Return the linear CKA of representations [n, D] and [n, E] of the same images."""
    similarity = LinearCKA()
    similarity.add(torch.from_numpy(x), torch.from_numpy(y))
    return similarity.value()


def shared_neighbours(x: Matrix, y: Matrix, k: int = NEIGHBOURS) -> float:
    """Return the mean share of the k nearest images (Euclidean, without the image itself) that are nearest in both."""
    k = min(k, len(x) - 1)
    sets = [_nearest(values, k) for values in (x, y)]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*sets, strict=True)]))


def _nearest(values: Matrix, k: int) -> list[list[int]]:
    rows = torch.from_numpy(values).double()
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    found: list[list[int]] = distances.topk(k, largest=False).indices.tolist()
    return found


def compared(named: Mapping[str, Matrix]) -> list[figures.Figure]:
    """Draw CKA and shared neighbours of each two representations, of the first 24."""
    if len(named) < 2 or len(next(iter(named.values()))) < 2:  # an image alone has no neighbours
        return []
    some = dict(list(named.items())[:_MOST_COMPARED])
    measures: dict[str, Any] = {"CKA": cka, "shared neighbours": shared_neighbours}
    captions = {
        "CKA": "Linear centred kernel alignment: 1 for representations that are the same but for rotation and scale.",
        "shared neighbours": f"The mean share of an image's {NEIGHBOURS} nearest images that both have.",
    }
    found = []
    for title, measure in measures.items():
        rows = [{"x": a, "y": b, title: measure(x, y)} for b, y in some.items() for a, x in some.items()]
        found.append(figures.heat_map(rows, "x", "y", title, title=title, caption=captions[title]))
    return found


def maps(named: Mapping[str, Matrix], classes: Sequence[str]) -> Iterator[figures.Figure]:
    """Yield PCA, then t-SNE of the first nine representations, each turned onto the first one's map.

    A single image, and a representation of one number, have no map. The caption has CKA and shared neighbours in the
    full space, and the share of neighbours that the map keeps. Raises MissingExtraError without scikit-learn.
    """
    with needs_extra("PCA and t-SNE", "report"):
        from scipy.linalg import orthogonal_procrustes
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    some = dict([(name, values) for name, values in named.items() if min(values.shape) > 1][:_MOST_MAPS])
    first = next(iter(some), "")
    perplexity = min(_PERPLEXITY, (len(classes) - 1) / 3)
    makers: dict[str, Any] = {
        "PCA": lambda x: PCA(2, svd_solver="full").fit_transform(x),
        "t-SNE": lambda x: TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(x),
    }
    for kind, place in makers.items():
        reference: NDArray[np.float64] | None = None
        for name, values in some.items():
            with threadpool_limits(1):  # threads wait for one another longer than so few images take
                points = place(values.astype(np.float64))
            points = (points - points.mean(axis=0)) / (points.std() or 1.0)
            if reference is None:
                reference = points
            points = points @ orthogonal_procrustes(points, reference)[0]
            rows = [{"x": float(x), "y": float(y), "class": c} for (x, y), c in zip(points, classes, strict=True)]
            kept = shared_neighbours(values, points.astype(np.float32))
            caption = f"The map keeps {100 * kept:.0f} % of {NEIGHBOURS} neighbours."
            if name != first:
                similarity = cka(some[first], values)
                shared = f"Shared with {first}: {100 * shared_neighbours(some[first], values):.0f} %"
                caption += f" {shared}; CKA {similarity:.2f}." if similarity is not None else f" {shared}."
            yield figures.embedding(rows, title=f"{kind}: {name}", caption=caption)
