"""Trials of a search: the points of its space, as cells of a sweep, and those drawn at random."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import JsonValue

from logitcache.config.recipe import Component
from logitcache.config.yaml_text import RecipeText
from logitcache.errors import RecipeError
from logitcache.sweeps.cells import Cell, label_of, named_cell, options_of, parse_grid, title_of
from logitcache.sweeps.search.search_recipe import Random
from logitcache.sweeps.search.space import RANGES, Range, Space

Value = str | int | float
"""A value of an axis: the label of a choice, or a number of a range."""
TrialState = Literal["finished", "stopped", "failed", "waiting"]


@dataclass(frozen=True)
class Axis:
    """A key of a space, or several that change together: a range, or choices by label."""

    key: str
    title: str
    range: Range | None
    options: Mapping[str, Mapping[str, JsonValue]]

    def at(self, share: float) -> Value:
        """Return the value below which a share of the axis lies."""
        if self.range is not None:
            return self.range.at(share)
        return list(self.options)[int(share * len(self.options))]

    def corners(self) -> Sequence[Value]:
        """Return every choice, or both ends of a range."""
        return list(self.options) if self.range is None else (self.range.at(0.0), self.range.at(1.0))

    def label(self, value: Value) -> str:
        """Return a label such as `width=8`."""
        return f"{self.title}={label_of(value)}"

    def changes(self, value: Value) -> Mapping[str, JsonValue]:
        """Return what a value changes in the student's recipe, by key."""
        return {self.key: value} if self.range is not None else self.options[str(value)]


@dataclass(frozen=True)
class Trial:
    """A trial: its number, from 0 on, and its cell."""

    number: int
    cell: Cell


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: its values by objective, in the recipe's order, after the epochs that it was trained.

    Values are means over seeds; of one that failed or waits there are none. is_front: no other finished trial surpasses
    it in all objectives. is_final: the same command would end it in the same way.
    """

    trial: int
    cell: str
    state: TrialState
    epochs: int
    changes: Mapping[str, JsonValue]
    values: Mapping[str, float] = field(default_factory=dict)
    is_front: bool = False
    reason: str | None = None
    is_final: bool = True


class Trials(Protocol):
    """Where trials come from, and where their results go."""

    def batch(self, numbers: range) -> list[Trial]:
        """Return the trials of these numbers, the same at each call."""

    def is_told(self, trial: Trial) -> bool:
        """Return whether the result of a trial is recorded."""

    def tell(self, result: TrialResult) -> None:
        """Record the result of a trial; of one that is recorded nothing happens."""


def axes_of(space: Space) -> list[Axis]:
    """Return the axes of a space. Raises RecipeError for keys that change together and values that do not fit them."""
    return [
        Axis(keys, title_of(keys, list(space)), values, {})
        if isinstance(values, Component)
        else Axis(keys, title_of(keys, list(space)), None, options_of(keys, values, "search.space"))
        for keys, values in space.items()
    ]


def trial_of(number: int, axes: Sequence[Axis], values: Mapping[str, Value]) -> Trial:
    """Return the trial of a number at a point, values by key."""
    labels = [f"trial={number}", *(axis.label(values[axis.key]) for axis in axes)]
    return Trial(number, named_cell(labels, [axis.changes(values[axis.key]) for axis in axes]))


def corners_of(axes: Sequence[Axis]) -> Iterator[Cell]:
    """Yield cells that have every choice and both ends of every range once, the others at their first value."""
    first = {axis.key: axis.corners()[0] for axis in axes}
    for axis in axes:
        for value in axis.corners():
            changes = [one.changes(value if one is axis else first[one.key]) for one in axes]
            yield named_cell([axis.label(value)], changes)


def parse_search(search: str | None, space: Sequence[str], trials: int | None) -> dict[str, Any]:
    """Read `--search`, `--space` and `--trials`; values are YAML. Raises RecipeError."""
    parsed: dict[str, Any] = {}
    if search is not None:
        text = RecipeText({})
        text.override(f"value={search}", lambda keys: None)
        value = text.data.get("value")
        if text.mistakes or not isinstance(value, str | dict):
            raise RecipeError(f"--search {search}: write a kind, or a mapping such as {{kind: optuna, batch: 4}}")
        parsed = value if isinstance(value, dict) else {"kind": value}
    if space:
        axes = parse_grid(space, "--space")
        parsed["space"] = {key: _range_of(values) for key, values in axes.items()}
    return parsed | ({} if trials is None else {"trials": trials})


def _range_of(values: list[Any]) -> Any:
    """Return a range that stands alone as it is, choices as a list."""
    first = values[0]
    is_range = len(values) == 1 and isinstance(first, dict) and first.get("kind") in RANGES
    return first if is_range else values


class RandomTrials:
    """Trials drawn by the seed, their number and the key alone."""

    def __init__(self, search: Random, axes: Sequence[Axis]) -> None:
        self._search, self._axes = search, axes

    def batch(self, numbers: range) -> list[Trial]:
        """Draw the trials of these numbers."""
        return [
            trial_of(number, self._axes, {axis.key: axis.at(self._share(number, axis.key)) for axis in self._axes})
            for number in numbers
        ]

    def _share(self, number: int, key: str) -> float:
        """Draw from [0, 1)."""
        digest = hashlib.sha256(f"{self._search.seed}\0{number}\0{key}".encode()).digest()
        return (int.from_bytes(digest[:8]) >> 11) / 2.0**53

    def is_told(self, trial: Trial) -> bool:
        """Return False: results are read from the runs."""
        return False

    def tell(self, result: TrialResult) -> None:
        """Do nothing."""
