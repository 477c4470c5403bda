"""Search the space of a sweep: ask for trials batch by batch, train them, tell how they ended, and take the best on."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from logitcache.config.recipe import NOWHERE
from logitcache.errors import RecipeError
from logitcache.runtime.console import logger
from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import Cell, SweepStudent, members_from
from logitcache.sweeps.halving import num_survivors
from logitcache.sweeps.objectives import best, fronts, is_measured, scores_of, values_of
from logitcache.sweeps.outcomes import Outcome, outcome_of
from logitcache.sweeps.search.search_recipe import Random, Search
from logitcache.sweeps.search.study import StudyTrials
from logitcache.sweeps.search.trials import (
    Axis,
    RandomTrials,
    Trial,
    TrialResult,
    Trials,
    TrialState,
    axes_of,
    corners_of,
)
from logitcache.sweeps.sweep_recipe import SweepRecipe
from logitcache.sweeps.trainer import Trainer


@dataclass(frozen=True)
class Searched:
    """A search: its trials, every student of them, and the students to compare with one another."""

    trials: tuple[TrialResult, ...]
    members: tuple[SweepStudent, ...]
    compared: tuple[SweepStudent, ...]


def require_sound(recipe: SweepRecipe) -> list[SweepStudent]:
    """Return a student of each choice and each end of a range; raise RecipeError listing those that are no recipe."""
    if recipe.search is None:
        return []
    corners = list(corners_of(axes_of(recipe.search.space)))
    return members_from(corners, recipe, recipe.all_seeds[:1], Path(NOWHERE))


def search(recipe: SweepRecipe, trainer: Trainer) -> Searched:
    """Train the trials of a search that are not finished, then its finalists and the cells beside them.

    A batch of which every trial ends by an error that is not its own ends the search: the same call tries it again.
    """
    searching = recipe.search
    assert searching is not None
    axes, results, members = axes_of(searching.space), list[TrialResult](), dict[str, SweepStudent]()
    trials = _open(recipe, searching, axes, trainer.out)
    cells: dict[str, Cell] = {}
    for numbers in _batches(searching):
        batch = [_same(trial, cells) for trial in trials.batch(numbers)]
        found = _run(batch, recipe, trials, trainer, members)
        results += found
        if not any(result.is_final for result in found):
            logger.info(f"the search ends after trial {numbers.stop - 1}: no trial of its last batch was trained")
            break
    results = _with_front(results, searching.objectives)
    return _finish(recipe, results, cells, members, trainer)


def _open(recipe: SweepRecipe, searching: Search, axes: Sequence[Axis], out: Path) -> Trials:
    if isinstance(searching, Random):
        return RandomTrials(searching, axes)
    left = searching.batch_size
    for _ in () if recipe.halving is None else recipe.halving.epochs:
        assert recipe.halving is not None
        left = num_survivors(left, recipe.halving.keep)
    return StudyTrials(searching, axes, left, out / "study.jsonl")


def _batches(searching: Search) -> Iterator[range]:
    size = searching.batch_size
    return (range(start, min(start + size, searching.trials)) for start in range(0, searching.trials, size))


def _same(trial: Trial, cells: dict[str, Cell]) -> Trial:
    """Return a trial with the cell of the first one at its point: nothing is trained twice."""
    return replace(trial, cell=cells.setdefault(repr(trial.cell.changes), trial.cell))


def _run(
    batch: Sequence[Trial], recipe: SweepRecipe, trials: Trials, trainer: Trainer, members: dict[str, SweepStudent]
) -> list[TrialResult]:
    """Train a batch, unless all of it is recorded, and record its results; add its students to `members`."""
    students: dict[int, list[SweepStudent]] = {}
    refused: dict[int, str] = {}
    for trial in batch:
        try:
            students[trial.number] = members_from([trial.cell], recipe, recipe.all_seeds, trainer.out)
        except RecipeError as error:
            refused[trial.number] = str(error)
            logger.info(f"trial {trial.number} is no recipe: {error}")
    own = {member.run: member for of_trial in students.values() for member in of_trial}
    own = {run: members.setdefault(run, member) for run, member in own.items()}
    if not all(map(trials.is_told, batch)):
        trainer.train(list(own.values()), recipe.halving)
    results = []
    for trial in batch:
        if trial.number in refused:
            reason = refused[trial.number]
            result = TrialResult(trial.number, trial.cell.name, "failed", 0, trial.cell.changes, reason=reason)
        else:
            result = _result(trial, students[trial.number], recipe, trainer.costs)
        if result.is_final:
            trials.tell(result)
        results.append(result)
    return results


def _result(
    trial: Trial, members: Sequence[SweepStudent], recipe: SweepRecipe, costs: ArchitectureCosts
) -> TrialResult:
    """Read how the students of a trial ended; values are means over its seeds."""
    assert recipe.search is not None
    outcomes = [outcome_of(member) for member in members]
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    epochs, objectives = min(outcome.epochs for outcome in outcomes), recipe.search.objectives
    result = TrialResult(trial.number, trial.cell.name, _state(outcomes), epochs, trial.cell.changes)
    if failures:
        final = any(failure.is_final for failure in failures)
        return replace(result, reason=f"{failures[0].error}: {failures[0].message}", is_final=final)
    if result.state == "waiting":
        return replace(result, is_final=False)
    values = []
    for member, outcome in zip(members, outcomes, strict=True):
        row = _last_measured(outcome, epochs)
        if result.state == "stopped" and not is_measured(objectives, row):
            return result  # halving compared by something else
        values.append(values_of(objectives, member, row, costs))
    means = map(statistics.fmean, zip(*values, strict=True))
    return replace(result, values=dict(zip(objectives, means, strict=True)))


def _state(outcomes: Sequence[Outcome]) -> TrialState:
    states = {outcome.state for outcome in outcomes}
    if states == {"finished"}:
        return "finished"
    if "failed" in states:
        return "failed"
    return "waiting" if "waiting" in states else "stopped"


def _last_measured(outcome: Outcome, epochs: int) -> dict[str, JsonValue]:
    """Return the last measurement of each metric in the first epochs of a run."""
    found: dict[str, JsonValue] = {}
    for row in outcome.rows[:epochs]:
        found |= {name: value for name, value in row.items() if value is not None}
    return found


def _with_front(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """Mark the finished trials that no other surpasses in all objectives."""
    front = next(fronts(_scores(results, objectives)), [])
    return [replace(result, is_front=result.state == "finished" and result.cell in front) for result in results]


def _scores(results: Sequence[TrialResult], objectives: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {
        result.cell: scores_of(objectives, list(result.values.values()))
        for result in results
        if result.state == "finished"
    }


def _finish(
    recipe: SweepRecipe,
    results: Sequence[TrialResult],
    cells: dict[str, Cell],
    members: dict[str, SweepStudent],
    trainer: Trainer,
) -> Searched:
    """Train finalists and the cells beside them with fresh seeds; without finalists, these cells with the search's."""
    assert recipe.search is not None
    finalists, beside = recipe.search.finalists, [Cell(name, changes) for name, changes in recipe.cells.items()]
    finished = {result.cell for result in results if result.state == "finished"}
    if finalists is None:
        chosen, seeds = [], recipe.all_seeds
        compared = [member for member in members.values() if member.cell in finished]
    else:
        scores = _scores(results, recipe.search.objectives)
        names = {r.cell for r in results if r.is_front} if finalists.count is None else {*best(scores, finalists.count)}
        chosen = [cell for cell in cells.values() if cell.name in names]
        first = max(recipe.all_seeds) + 1
        seeds, compared = tuple(range(first, first + finalists.seeds)), []
        logger.info(f"{len(chosen)} finalists are trained with seeds {first} to {seeds[-1]}")
    final = members_from([*beside, *chosen], recipe, seeds, trainer.out)
    trainer.train(final, None)
    compared = [*final, *compared]
    return Searched(tuple(results), tuple({m.run: m for m in [*members.values(), *final]}.values()), tuple(compared))
