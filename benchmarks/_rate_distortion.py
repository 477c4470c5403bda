"""How many bits the transform takes above the least that any code of its Gaussian model takes at the same error."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.encodings.basis import Basis, compand, expand
from logitcache.cache.encodings.fitted_transform import MEAN_UNIT, FittedTransform
from logitcache.cache.encodings.measure import stored
from logitcache.logits import CompactLogits


class Bound(NamedTuple):
    """The rate of a Gaussian vector at a squared error: bits of all components, and how many of these take any."""

    bits: float
    active: int


def gaussian_bound(variances: NDArray[np.float64], distortion: float) -> Bound:
    """Return the rate-distortion function of independent Gaussians [C] at a total squared error, above 0.

    Reverse water-filling (Cover and Thomas, "Elements of Information Theory", 2006, theorem 10.3.3): a component of
    variance v has the error min(level, v) and the rate max(0, log2(v / level) / 2). The level is found by bisection.
    """
    if distortion >= variances.sum():
        return Bound(0.0, 0)
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level, variances).sum() < distortion else (low, level)
    active = variances[variances > high]
    return Bound(float(np.log2(active / high).sum() / 2), len(active))


class Errors(NamedTuple):
    """Of judged rows: the mean total squared error, second moments of coefficients [C], and the share of outliers."""

    distortion: float
    moments: NDArray[np.float64]
    outliers: float


def companded_errors(fitted: FittedTransform, basis: Basis, judged: Tensor) -> Errors:
    """Measure logits [N, C] in the domain of the transform's coefficients; outliers, coded otherwise, are left out."""
    rows = {name: torch.from_numpy(values) for name, values in stored(fitted, judged).items()}
    near = rows["exponent"] == 0
    decoded = fitted.decode(rows, judged.shape[1])
    assert isinstance(decoded, CompactLogits)
    mean = expand(rows["mean"].float()[:, None] * fitted.form.step * MEAN_UNIT, fitted.form.bend)
    exact = compand(judged.float() - judged.float().mean(dim=1, keepdim=True), basis.bend)[near]
    error = (exact - compand(decoded.logits - mean, basis.bend)[near]).double().square().sum(dim=1).mean()
    moments = ((exact - basis.mean) @ basis.vectors.T).double().square().mean(dim=0)
    return Errors(float(error), moments.numpy(), 1 - float(near.double().mean()))


def above_bound(
    step: float, bits: float, fitted: list[FittedTransform], bases: list[Basis], judged: list[Tensor]
) -> dict[str, Any]:
    """Compare the bits of a row's coefficients with the bounds of the fitted and of the judged rows' variances."""
    found = [companded_errors(*one) for one in zip(fitted, bases, judged, strict=True)]
    bounds = {
        "fitted": [basis.deviation.double().square().numpy() for basis in bases],
        "judged": [errors.moments for errors in found],
    }
    row: dict[str, Any] = {
        "step": step,
        "bits": bits,
        "distortion": float(np.mean([errors.distortion for errors in found])),
        "outliers": float(np.mean([errors.outliers for errors in found])),
    }
    for name, variances in bounds.items():
        parts = [gaussian_bound(one, errors.distortion) for one, errors in zip(variances, found, strict=True)]
        least, active = np.mean(parts, axis=0)
        row |= {f"{name}_bits": least, f"{name}_active": active, f"{name}_excess": (bits - least) / active}
    return row
