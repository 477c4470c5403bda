"""Objectives of cells: what trials and halving are compared by, and which cells no other surpasses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitcache.errors import RecipeError
from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.sweep_recipe import COSTS

_COLUMNS = {"accuracy": ("val_top1", "val_mean_ap"), "agreement": ("val_agreement",)}
"""Columns of `metrics.jsonl` by objective, the first that is there."""

Scores = tuple[float, ...]
"""Values of several metrics, signed such that more is better."""


def less_is_better(metric: str) -> bool:
    """Return whether less of an objective, or of a column such as `-loss`, is better."""
    return metric in COSTS or metric.startswith("-")


def values_of(
    metrics: Sequence[str], member: SweepStudent, row: Mapping[str, Any], costs: ArchitectureCosts
) -> list[float]:
    """Return metrics of a student by a row of its `metrics.jsonl`. Raises RecipeError for one that is not in it."""
    return [
        float(getattr(costs.of(member.recipe), metric)) if metric in COSTS else _measured(metric, member, row)
        for metric in metrics
    ]


def is_measured(metrics: Sequence[str], row: Mapping[str, Any]) -> bool:
    """Return whether a row has all metrics but the costs of a model."""
    return all(any(row.get(column) is not None for column in _columns(one)) for one in metrics if one not in COSTS)


def _columns(metric: str) -> tuple[str, ...]:
    return _COLUMNS.get(metric, (metric.removeprefix("-"),))


def _measured(metric: str, member: SweepStudent, row: Mapping[str, Any]) -> float:
    columns = _columns(metric)
    for column in columns:
        if row.get(column) is not None:
            return float(row[column])
    raise RecipeError(
        f"{columns[0]} was not measured in epoch {row['epoch']} of {member.run}, which has {sorted(row)}. "
        "Fix: compare by one of these, or validation with an `every` that divides the epochs of halving and the last"
    )


def scores_of(metrics: Sequence[str], values: Sequence[float]) -> Scores:
    """Return values of metrics, signed such that more is better."""
    return tuple(-value if less_is_better(metric) else value for metric, value in zip(metrics, values, strict=True))


def best(scores: Mapping[str, Scores], count: int) -> list[str]:
    """Return the best by several scores: front by front of those that none surpasses, and within by crowding distance.

    Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002); of one score that is its order.
    """
    chosen: list[str] = []
    for front in fronts(scores):
        if len(chosen) >= count:
            break
        crowding = _crowding({name: scores[name] for name in front})
        chosen += sorted(front, key=lambda name: -crowding[name])  # equal ones in the order of cells
    return chosen[:count]


def fronts(scores: Mapping[str, Scores]) -> Iterator[list[str]]:
    """Yield those that no other surpasses, then those that no other of the rest surpasses, and so on."""
    left = dict(scores)
    while left:
        front = [name for name, own in left.items() if not any(surpasses(other, own) for other in left.values())]
        yield front
        left = {name: own for name, own in left.items() if name not in front}


def surpasses(one: Scores, other: Scores) -> bool:
    """Return whether scores are at least as high as others, and one of them higher."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _crowding(front: Mapping[str, Scores]) -> dict[str, float]:
    """Return how far apart each of a front is from its neighbours, infinite at the ends; 0 of scores that are equal."""
    distance = dict.fromkeys(front, 0.0)
    for number in range(len(next(iter(front.values())))):
        ordered = sorted(front, key=lambda name: front[name][number])
        if span := front[ordered[-1]][number] - front[ordered[0]][number]:
            distance[ordered[0]] = distance[ordered[-1]] = math.inf
            for before, name, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
                distance[name] += (front[after][number] - front[before][number]) / span
    return distance
