"""The basis in which the companded logits of a teacher vary independently (Karhunen-Loève)."""

from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.errors import RecipeError

BEND = 7.0
"""Root mean squares of logits from which companding is felt."""

WITHIN = 10.0
HELD_OUT = 5
SMOOTHED = 21
LEADING = 30


class Basis(NamedTuple):
    """Logits less their row mean, companded, are `mean` [C] plus coefficients times `vectors` [C, C].

    bend: where companding begins, see `compand`; vectors: orthonormal, the largest variance first; deviation: [C], root
    mean square of each coefficient on rows that the basis was not fitted to.
    """

    bend: float
    mean: Tensor
    vectors: Tensor
    deviation: Tensor


def compand(logits: Tensor, bend: float) -> Tensor:
    """Return bend · asinh(z / bend): what is much smaller than `bend` stays, what is larger counts by its logarithm.

    The few largest logits of a row would else take bits of every coefficient, and their errors are corrected anyway.
    """
    return bend * torch.asinh(logits / bend)


def expand(companded: Tensor, bend: float) -> Tensor:
    """Return the logits that `compand` companded."""
    return bend * torch.sinh(companded / bend)


def fit_basis(logits: Tensor, images: Tensor | None = None) -> Basis:
    """Fit to logits [N, C]; `images` [N] numbers the image that each row is a view of.

    Raises RecipeError for fewer than two rows.
    """
    if len(logits) < 2:
        raise RecipeError(
            f"a basis cannot be fitted to {len(logits)} rows of logits. Fix: two calibration rows or more"
        )
    centred = logits.double() - logits.double().mean(dim=1, keepdim=True)
    bend = BEND * max(float(centred.square().mean().sqrt()), 1e-30)
    rows = compand(centred, bend)
    numbers = torch.arange(len(rows)) if images is None else images
    numbers = torch.unique(numbers.to(rows.device), return_inverse=True)[1]
    mean, vectors = _principal(rows, numbers)
    return Basis(bend, mean.float(), vectors.float(), _deviation(rows, numbers).float())


def _principal(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [C] and the eigenvectors [C, C] of the covariance, the largest variance first.

    Views of an image differ in fewer ways than images do, yet there are more independent differences of views than
    images: what varies within an image counts `WITHIN` times, which finds the small components with fewer images. Rows
    far from the mean would decide alone: they count in proportion to their distance, not to its square.
    """
    mean = rows.mean(dim=0)
    centred = rows - mean
    sums = torch.zeros(int(images.max()) + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    sums.index_add_(0, images, centred)
    between = (sums / images.bincount()[:, None])[images]
    within = centred - between
    weight = centred.norm(dim=1, keepdim=True).clamp(min=1e-30).rsqrt()
    between, within = between * weight, within * weight
    scatter = between.T @ between + WITHIN * within.T @ within
    return mean, torch.linalg.eigh(scatter).eigenvectors.flip(1).T


def _deviation(rows: Tensor, images: Tensor) -> Tensor:
    """Return the root mean square of coefficients [C] on a fifth of the images, in a basis fitted to the others."""
    held_out = images % HELD_OUT == 0
    fitted, judged = (rows[~held_out], rows[held_out]) if int(images.max()) >= HELD_OUT else (rows, rows)
    mean, vectors = _principal(fitted, images[~held_out] if len(fitted) < len(rows) else images)
    variance = ((judged - mean) @ vectors.T).square().mean(dim=0)
    # Few rows estimate a variance badly, and neighbours are alike, but for the first.
    padded = torch.nn.functional.pad(variance[None, None], (SMOOTHED // 2,) * 2, mode="replicate")
    smooth = torch.nn.functional.avg_pool1d(padded, SMOOTHED, 1)[0, 0]
    return torch.cat([variance[:LEADING], smooth[LEADING:]]).sqrt()
