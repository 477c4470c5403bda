"""The errors of an encoding over all rows: a histogram for each shard, which add up in any order."""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from logitcache.config.recipe import Component, Lenient

LOWEST, OCTAVES, PER_OCTAVE = -40, 48, 8
"""Bins from 2^-40 to 2^8, an eighth of an octave each; what is smaller or larger is in the first or last."""

SUM, MAX, COUNTS = 0, 1, 2
NUM_STATISTICS = COUNTS + OCTAVES * PER_OCTAVE
QUANTILE = 0.999
BOUND = 0.001
"""Nats of T² · mean KL(full ‖ decoded), the size that a loss has with its factor T², from which users are warned.

By Pinsker's inequality the probabilities of a row at T = 1 then differ by √(2 · 0.001) = 4.5 % in sum, at most.
"""

Error = Annotated[float, Field(ge=0.0), Lenient]


class RowErrors(Component):
    """Mean, 99.9th percentile (up to the next eighth of an octave) and maximum over all rows.

    Of logits KL(full ‖ decoded) in nats at `temperature`; of a feature, without one, squared error over squares.
    """

    temperature: Error | None
    mean: Error
    p999: Error
    max: Error

    @property
    def scaled(self) -> float:
        """The mean times T²; as it is without a temperature."""
        return self.mean * (self.temperature or 1.0) ** 2


def count_errors(statistics: NDArray[np.float64], errors: Tensor, *, by_row: bool = False) -> None:
    """Count the errors [K, B] of a batch in statistics of K temperatures, [K, S], or [S] if K is 1; in place.

    `by_row` adds one row after another, so that sums do not depend on where batches end.
    """
    if by_row:
        for row in errors.unbind(1):
            count_errors(statistics, row[:, None])
        return
    values = errors.double().cpu().numpy()
    with np.errstate(divide="ignore"):
        place = np.floor((np.log2(values) - LOWEST) * PER_OCTAVE)
    bins = np.clip(place, 0, OCTAVES * PER_OCTAVE - 1).astype(np.int64)
    for total, found, row in zip(statistics.reshape(-1, NUM_STATISTICS), values, bins, strict=True):
        total[SUM] += found.sum()
        total[MAX] = max(total[MAX], found.max(initial=0.0))
        total[COUNTS:] += np.bincount(row, minlength=OCTAVES * PER_OCTAVE)


def summary(shards: NDArray[np.float64], temperature: float | None) -> RowErrors:
    """Return the errors over all rows of shards with statistics [N, S] of one temperature."""
    counts = shards[:, COUNTS:].sum(axis=0)
    largest, num_rows = float(shards[:, MAX].max()), counts.sum()
    reached = int(np.searchsorted(counts.cumsum(), QUANTILE * num_rows))
    upper = 2.0 ** (LOWEST + (reached + 1) / PER_OCTAVE)
    mean = float(shards[:, SUM].sum() / num_rows)
    return RowErrors(temperature=temperature, mean=mean, p999=min(upper, largest), max=largest)
