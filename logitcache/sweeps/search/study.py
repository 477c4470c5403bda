"""Trials of an Optuna study, by ask and tell; the study is a journal in the sweep's folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitcache.errors import CacheError, MismatchError, needs_extra
from logitcache.sweeps.objectives import less_is_better
from logitcache.sweeps.search.search_recipe import Optuna
from logitcache.sweeps.search.space import Integer, LogUniform
from logitcache.sweeps.search.trials import Axis, Trial, TrialResult, trial_of

_BEGUN = "search"
"""The attribute of a study with the entries that it was begun with."""
_FREE = {"trials", "finalists"}
"""Entries of a search that may change as it goes on."""


def import_optuna() -> Any:
    """Import Optuna. Raises MissingExtraError without it."""
    with needs_extra("a search of kind optuna", "tune"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class StudyTrials:
    """Trials of a study. Each is drawn by its number and the results before it, also after a kill."""

    def __init__(self, search: Optuna, axes: Sequence[Axis], generation: int, path: Path) -> None:
        """Open the study of a sweep, or begin it; `generation`: how many trials of a batch are trained to the end.

        The caller has locked the folder. Raises CacheError for a damaged journal, MismatchError for a study that was
        begun by another search.
        """
        self._search, self._axes, self._generation = search, axes, generation
        self._optuna = import_optuna()
        self._distributions = {axis.key: self._distribution(axis) for axis in axes}
        self._study = self._opened(path)

    def batch(self, numbers: range) -> list[Trial]:
        """Return the trials of these numbers; ask for those that the study does not have yet."""
        for number in range(len(self._whole()), numbers.stop):
            # A sampler for each trial: what it draws does not depend on where a process began.
            self._study.sampler = self._sampler(number)
            self._study.ask(self._distributions)
        whole = self._whole()
        return [trial_of(number, self._axes, whole[number].params) for number in numbers]

    def is_told(self, trial: Trial) -> bool:
        """Return whether the study has the result of a trial."""
        return bool(self._whole()[trial.number].state.is_finished())

    def tell(self, result: TrialResult) -> None:
        """Record a result: its values, or that halving stopped the trial, or that it failed."""
        found, states = self._whole()[result.trial], self._optuna.trial.TrialState
        if found.state.is_finished():
            return
        if result.state == "finished":
            self._study.tell(found.number, list(result.values.values()))
            return
        if result.state == "stopped" and len(result.values) == 1 and result.epochs not in found.intermediate_values:
            # Of one objective TPE learns from stopped trials too; NSGA-II has no use for them.
            (value,) = result.values.values()
            self._optuna.trial.Trial(self._study, found._trial_id).report(value, result.epochs)
        self._study.tell(found.number, state=states.PRUNED if result.state == "stopped" else states.FAIL)

    def _whole(self) -> list[Any]:
        """Return the trials by number, without those that a kill left without all of their values."""
        running = self._optuna.trial.TrialState.RUNNING
        for trial in self._study.get_trials(deepcopy=False, states=(running,)):
            if trial.params.keys() != self._distributions.keys():
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
        found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.params.keys() == self._distributions.keys()]

    def _opened(self, path: Path) -> Any:
        journal = self._optuna.storages.journal
        _repair(path)
        try:
            study = self._optuna.create_study(
                storage=self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(path))),
                study_name="sweep",
                load_if_exists=True,
                directions=["minimize" if less_is_better(name) else "maximize" for name in self._search.objectives],
            )
            begun = study.user_attrs.get(_BEGUN)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # what reading a damaged journal raises
            raise CacheError(
                f"{path} is damaged: {error}. Fix: put back a copy of it, or search again into another folder"
            ) from error
        entries = self._search.model_dump(mode="json", exclude=_FREE) | {"generation": self._generation}
        if begun is None:
            study.set_user_attr(_BEGUN, entries)
        elif changed := [key for key in entries if begun.get(key) != entries[key]]:
            lines = [
                f"{key}: the study has {json.dumps(begun.get(key))}, the recipe {json.dumps(entries[key])}"
                for key in changed
            ]
            raise MismatchError(
                f"{path} is of another search:\n  " + "\n  ".join(lines) + "\n"
                "  Fix: change these back to continue it, or search into another folder"
            )
        return study

    def _distribution(self, axis: Axis) -> Any:
        kinds, found = self._optuna.distributions, axis.range
        if found is None:
            return kinds.CategoricalDistribution(list(axis.options))
        if isinstance(found, Integer):
            high = found.at(1.0)  # Optuna warns of a range that is no multiple of its step
            return kinds.IntDistribution(found.low, high, step=found.step)
        return kinds.FloatDistribution(found.low, found.high, log=isinstance(found, LogUniform))

    def _sampler(self, number: int) -> Any:
        digest = hashlib.sha256(f"{self._search.seed}\0{number}".encode()).digest()
        seed, samplers = int.from_bytes(digest[:4]), self._optuna.samplers
        if len(self._search.objectives) == 1:
            return samplers.TPESampler(seed=seed, constant_liar=True)
        sampler = samplers.NSGAIISampler(seed=seed, population_size=max(2, self._generation))
        select = sampler.select_parent
        # Parents in the order of their numbers, as Optuna has them if it reads them again.
        sampler.select_parent = lambda *args: sorted(select(*args), key=lambda trial: trial.number)
        return sampler


def _repair(path: Path) -> None:
    """Cut a last line that a kill left incomplete, and remove the lock of a killed process."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.lock")
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
