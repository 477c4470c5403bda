"""Successive halving: which cells of a sweep go on after an epoch."""

import math
import statistics
from collections.abc import Mapping, Sequence

from logitcache.errors import RecipeError
from logitcache.sweeps.cells import Member
from logitcache.sweeps.outcomes import outcome_of
from logitcache.sweeps.sweep_recipe import Halving


def promoted(halving: Halving, members: Sequence[Member], epochs: int) -> list[Member]:
    """Return the students of the best cells after so many epochs; those of cells that failed do not go on."""
    scores: dict[str, list[tuple[float, ...]]] = {}
    failed = set()
    for member in members:
        rows = [row for row in outcome_of(member).rows if row["epoch"] == epochs - 1]
        if rows:
            scores.setdefault(member.cell, []).append(_score(halving, rows[0], member))
        else:
            failed.add(member.cell)
    means = {
        cell: tuple(map(statistics.fmean, zip(*values, strict=True)))
        for cell, values in scores.items()
        if cell not in failed
    }
    kept = set(best(means, max(1, math.ceil(halving.keep * len({member.cell for member in members})))))
    return [member for member in members if member.cell in kept]


def _score(halving: Halving, row: Mapping[str, float | int | None], member: Member) -> tuple[float, ...]:
    """Return the metrics of an epoch, such that more is better."""
    values = []
    for metric in halving.metrics:
        name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
        value = row.get(name)
        if value is None:
            raise RecipeError(
                f"halving.metrics: {name} was not measured in epoch {row['epoch']} of {member.run}, which has "
                f"{sorted(row)}. Fix: one of these, or validation with an `every` that divides halving.epochs"
            )
        values.append(sign * float(value))
    return tuple(values)


def best(scores: Mapping[str, tuple[float, ...]], count: int) -> list[str]:
    """Return the best by several scores: front by front of those that none surpasses, and within by crowding distance.

    Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002); of one score that is its order.
    """
    chosen: list[str] = []
    left = dict(scores)
    while left and len(chosen) < count:
        front = [name for name, own in left.items() if not any(surpasses(other, own) for other in left.values())]
        crowding = _crowding({name: left[name] for name in front})
        chosen += sorted(front, key=lambda name: -crowding[name])  # equal ones in the order of cells
        left = {name: own for name, own in left.items() if name not in front}
    return chosen[:count]


def surpasses(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether scores are at least as high as others, and one of them higher."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _crowding(front: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Return how far apart each of a front is from its neighbours, infinite at the ends."""
    distance = dict.fromkeys(front, 0.0)
    for number in range(len(next(iter(front.values())))):
        ordered = sorted(front, key=lambda name: front[name][number])
        span = front[ordered[-1]][number] - front[ordered[0]][number]
        distance[ordered[0]] = distance[ordered[-1]] = math.inf
        for before, name, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
            distance[name] += (front[after][number] - front[before][number]) / span if span else 0.0
    return distance
