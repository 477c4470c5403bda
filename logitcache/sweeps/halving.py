"""Successive halving: select the cells of a sweep that continue after an epoch."""

import math
import statistics
from collections.abc import Sequence

from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.objectives import Scores, best, scores_of, values_of
from logitcache.sweeps.outcomes import outcome_of


def promoted(
    members: Sequence[SweepStudent], epochs: int, keep: float, metrics: Sequence[str], costs: ArchitectureCosts
) -> list[SweepStudent]:
    """Return the students of the best cells after a number of epochs, without cells that failed."""
    scores: dict[str, list[Scores]] = {}
    failed = set()
    for member in members:
        rows = [row for row in outcome_of(member).rows if row["epoch"] == epochs - 1]
        if rows:
            values = values_of(metrics, member, rows[0], costs)
            scores.setdefault(member.cell, []).append(scores_of(metrics, values))
        else:
            failed.add(member.cell)
    means = {
        cell: tuple(map(statistics.fmean, zip(*values, strict=True)))
        for cell, values in scores.items()
        if cell not in failed
    }
    kept = set(best(means, num_survivors(len({member.cell for member in members}), keep)))
    return [member for member in members if member.cell in kept]


def num_survivors(count: int, keep: float) -> int:
    """Return the number of cells that continue: the fraction `keep` of `count`, at least one."""
    return max(1, math.ceil(round(keep * count, 9)))  # 0.07 of 100 are 7, and 0.07 * 100 is a little more
