"""Logits as rounded coefficients in a basis fitted to the teacher, the largest corrected (Karhunen-Loève)."""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from logitcache.cache.encodings.base import CalibrationSample, LogitsEncoding
from logitcache.cache.encodings.basis import Basis, fit_basis
from logitcache.cache.encodings.fitted_transform import BYTE, PAIR, FittedTransform, TransformForm
from logitcache.cache.encodings.trellis import shrinkage
from logitcache.config.recipe import Positive

BASIS_SCALE = 2**11
"""A float that keeps 11 bits, as TF32 does, holds every entry of the integer basis."""

HEADROOM = 6.0
PAIRS, TRIPLES, COUPLED = 3.0, 1.4, 0.7
"""Deviations, in half steps, up to which pairs hold coefficients, and triples, and up to which they are not coupled."""

NEGLIGIBLE = 0.05
TEMPERATURES = (1.5, 4.0)


class Transform(LogitsEncoding):
    """All logits, as coefficients in a basis fitted to calibration rows: about 215 bytes for 1,000 classes by default.

    The decoder corrects the largest logits of its approximation; as integer arithmetic makes the approximation
    identical everywhere, their indices need not be stored.
    """

    kind: Literal["transform"] = "transform"
    step: Positive = Field(
        default=0.8,
        description="Step to whose multiples coefficients are rounded. Half the step takes about one more bit per "
        "coefficient and leaves a quarter of the divergence.",
    )
    corrections: int = Field(
        default=64, ge=0, description="Number of the largest logits that are corrected in each row."
    )
    storage: Literal["packed"] = Field(
        default="packed", description="Always packed: compressed with zstd, and read a shard at a time."
    )

    def fit(self, logits: Tensor, images: Tensor | None = None) -> FittedTransform:
        """Fit to calibration logits [N, C]; `images` [N] numbers the image that each row is a view of.

        Raises RecipeError for fewer than two rows.
        """
        return self.with_basis(fit_basis(logits, images), logits)

    def largest(self, network: nn.Module, num_classes: int) -> TransformForm:
        """Return a form that takes most: no coefficient shares a byte or is dropped."""
        corrections = min(self.corrections, num_classes)
        return TransformForm(
            step=self.step,
            bend=1.0,
            wide=num_classes,
            quints=0,
            correction_bytes=corrections,
            corrections=corrections,
        )

    def fitted(self, sample: CalibrationSample) -> FittedTransform:
        """Fit to the rows of a sample."""
        return self.fit(sample.logits, sample.images)

    def with_basis(self, basis: Basis, logits: Tensor) -> FittedTransform:
        """Choose the stored form for a fitted basis; the steps of the corrections come from calibration rows [N, C]."""
        unit = self.step / 2
        # Coefficients beyond the last that ever differs from zero are dropped.
        deviation = basis.deviation[: max(1, _leading(basis.deviation, NEGLIGIBLE * self.step))] / unit
        num, coupled = len(deviation), _leading(deviation, COUPLED)
        above = [_leading(deviation, limit) for limit in (2 * BYTE.limit / HEADROOM, PAIRS, TRIPLES)]
        wide, long, not_triples = (min(count, coupled) for count in above)
        steps = _correction_steps(logits, min(self.corrections, logits.shape[1]), self.step, basis.bend)
        form = TransformForm(
            step=self.step,
            bend=basis.bend,
            wide=wide,
            bytes=long - wide,
            pairs=not_triples - long,
            triples=coupled - not_triples,
            quints=num - coupled,
            # A residual deviates by about a third of the step of the coefficients.
            correction_bytes=int((steps * PAIR.limit < HEADROOM * self.step / 3).sum()),
            corrections=len(steps),
        )
        # zstd searches badly if the first numbers have many bits, as it expects the same of all.
        order = torch.cat([torch.arange(wide), torch.arange(wide, long).flip(0), torch.arange(long, num)])
        deviation = deviation[order]
        vectors = (basis.vectors[order] * shrinkage(deviation, coupled)[:, None] * BASIS_SCALE).round()
        tables = {
            "basis": vectors.short().cpu().numpy(),
            # The middle of the coupled coefficients is half a half step below their mean.
            "centre": (basis.mean / unit * BASIS_SCALE + vectors[:coupled].sum(dim=0) / 2).round().int().cpu().numpy(),
            "deviation": deviation.cpu().numpy().astype(np.float32),
            "correction_step": steps.cpu().numpy().astype(np.float32),
        }
        return FittedTransform(form, {name: table for name, table in tables.items() if table.size})


def _leading(deviation: Tensor, limit: float) -> int:
    """Count the leading coefficients up to the last that deviates by more than a limit."""
    larger = (deviation > limit).nonzero()
    return int(larger.max()) + 1 if len(larger) else 0


def _correction_steps(logits: Tensor, count: int, step: float, bend: float) -> Tensor:
    """Return the step of each rank's correction, [count], ascending, at most `step`.

    An error e of a logit costs p(1 - p) e² / 2T² of divergence; if it is companded, 1 + (z / bend)² times as much.
    Steps make it cost as much at each rank as on average below: the sum over temperatures of those costs, times step²,
    is one number.
    """
    ordered = logits.float().sort(dim=1, descending=True).values
    stretch = 1 + ((ordered - ordered.mean(dim=1, keepdim=True)) / bend).square()
    cost = torch.zeros(ordered.shape[1], device=logits.device)
    for temperature in TEMPERATURES:
        p = torch.softmax(ordered / temperature, dim=1)
        cost += (p * (1 - p) * stretch).mean(dim=0) / (2 * temperature**2)
    base = cost[count:].mean() if count < len(cost) else cost[-1]
    steps = step * (base / cost[:count].clamp(min=1e-30)).sqrt().clamp(min=1 / math.sqrt(BASIS_SCALE), max=1.0)
    return torch.cummax(steps, dim=0).values if count else steps
