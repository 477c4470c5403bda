"""Compare the cells of a sweep: mean and deviation over seeds, and differences from a baseline seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.comparison.student_t import quantile, two_sided
from logitcache.sweeps.outcomes import Outcome

CONFIDENCE = 0.95
FEWEST = 3
"""Seeds without which no interval is given."""

MEASURES = ("top1", "best_top1", "mean_ap", "best_mean_ap", "f1_macro", "agreement", "loss")
"""Columns of the comparison, those that were measured; the first is what cells are compared by."""


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, and the (n - 1) standard deviation, None of one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of some values, at least one."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """A cell less the baseline, paired by seed: students of one seed began alike, and saw the same views in order.

    low, high: the 95 % interval of the mean by Student's t, and p of the paired t-test, None of fewer than three seeds;
    p_holm: the same corrected for the number of comparisons (Holm 1979). above: seeds in which the cell was the higher
    one; p_sign: the two-sided sign test, without ties.
    """

    seeds: int
    mean: float
    deviation: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    above: int = 0
    p_sign: float | None = None

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        """Return that of differences, one a seed, at least one."""
        spread, count = Spread.of(differences), len(differences)
        above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        found = cls(count, spread.mean, spread.deviation, above=above)
        if count < FEWEST or spread.deviation is None:
            return found
        error = spread.deviation / math.sqrt(count)
        reach = quantile(CONFIDENCE, count - 1) * error
        same = 1.0 if spread.mean == 0 else 0.0  # differences without any deviation
        return replace(
            found,
            low=spread.mean - reach,
            high=spread.mean + reach,
            p=two_sided(spread.mean / error, count - 1) if error else same,
            p_sign=sign_test(above, below),
        )


@dataclass(frozen=True)
class Row:
    """A cell: how many of its seeds finished, its measures, and its difference from the baseline.

    target_error: the encoding's mean KL divergence at the temperatures of the cell's losses, times T², in nats; None
    if the cache records none.
    """

    cell: str
    seeds: int
    measures: Mapping[str, Spread]
    difference: Difference | None = None
    target_error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Cells side by side: `difference` is in `metric`, from `baseline`; `comparisons` were made and corrected for."""

    metric: str | None
    baseline: str | None
    comparisons: int
    rows: tuple[Row, ...] = field(default_factory=tuple)


def compare(
    outcomes: Mapping[SweepStudent, Outcome], baseline: str | None = None, errors: Mapping[str, float] | None = None
) -> Comparison:
    """Compare finished students by cell; `baseline` is by default the first cell that has any."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for member, outcome in outcomes.items():
        seeds = found.setdefault(member.cell, {})
        if outcome.result is not None:
            seeds[member.seed] = _measures(outcome)
    return compare_measures(found, baseline, errors)


def compare_measures(
    found: Mapping[str, Mapping[int, Mapping[str, float]]],
    baseline: str | None = None,
    errors: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare measures by cell and seed; `baseline` is by default the first cell that has any."""
    metric = next((name for name in MEASURES if any(name in one for s in found.values() for one in s.values())), None)
    baseline = baseline or next((cell for cell, seeds in found.items() if seeds), None)
    rows = [_row(cell, seeds, (errors or {}).get(cell)) for cell, seeds in found.items()]
    if metric is None or baseline is None:
        return Comparison(metric, baseline, 0, tuple(rows))
    base = found.get(baseline, {})
    rows = [row if row.cell == baseline else _compared(row, found[row.cell], base, metric) for row in rows]
    compared = [row.difference for row in rows if row.difference is not None]
    corrected = iter(holm([difference.p for difference in compared]))
    rows = [
        row if row.difference is None else replace(row, difference=replace(row.difference, p_holm=next(corrected)))
        for row in rows
    ]
    return Comparison(metric, baseline, len(compared), tuple(rows))


def _measures(outcome: Outcome) -> dict[str, float]:
    """Return what the last epoch measured, and the best one of a metric where that is another column."""
    result = outcome.result
    last = {name: row.get(f"val_{name}") for row in outcome.rows[-1:] for name in MEASURES}
    found = last | {"loss": result and result.loss}
    if result is not None:
        found |= {"best_top1": result.best_top1, "best_mean_ap": result.best_mean_ap}
    return {name: float(value) for name, value in found.items() if value is not None}


def _row(cell: str, seeds: Mapping[int, Mapping[str, float]], error: float | None) -> Row:
    names = [name for name in MEASURES if any(name in one for one in seeds.values())]
    spreads = {name: Spread.of([one[name] for one in seeds.values() if name in one]) for name in names}
    return Row(cell, len(seeds), spreads, target_error=error)


def _compared(
    row: Row, own: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]], metric: str
) -> Row:
    differences = [
        own[seed][metric] - base[seed][metric]
        for seed in own.keys() & base.keys()
        if metric in own[seed] and metric in base[seed]
    ]
    return replace(row, difference=Difference.of(sorted(differences))) if differences else row


def sign_test(above: int, below: int) -> float:
    """Return the two-sided probability of at least so unequal a count of signs, if both are as likely."""
    count, fewer = above + below, min(above, below)
    return min(1.0, 2.0 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2.0**count)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number, those that are there (Holm, "A simple sequentially rejective … procedure")."""
    ranked = sorted((p, n) for n, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, n) in enumerate(ranked):
        highest = corrected[n] = max(highest, min(1.0, (len(ranked) - rank) * p))
    return corrected
