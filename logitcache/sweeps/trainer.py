"""Train students of a sweep rung by rung: those that share batches together, here or on a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.runtime.console import logger
from logitcache.runtime.stopping import StopFlag
from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import SweepStudent
from logitcache.sweeps.cluster import SweepWorkers
from logitcache.sweeps.groups import groups_of
from logitcache.sweeps.halving import promoted
from logitcache.sweeps.outcomes import outcome_of
from logitcache.sweeps.progress import SweepProgress
from logitcache.sweeps.stream import train_group
from logitcache.sweeps.sweep_recipe import Halving, SweepRecipe


@dataclass(frozen=True)
class Trainer:
    """Where and how the students of a sweep train: on the workers of `spread`, or here without them."""

    recipe: SweepRecipe
    out: Path
    spread: SweepWorkers | None
    stop: StopFlag
    progress: SweepProgress
    costs: ArchitectureCosts

    def train(self, members: Sequence[SweepStudent], halving: Halving | None) -> list[SweepStudent]:
        """Train students to their end; return those that halving left out. Raises Stopped."""
        self.progress.add(members)
        going = list(members)
        if self.recipe.needed_costs:
            going = self.costs.measured(going, self.progress.refuse)
        for until in (*(halving.epochs if halving else ()), None):
            self._train_until(going, until)
            if until is not None and halving is not None:
                going = promoted(going, until, halving.keep, self.recipe.compared_by, self.costs)
        return [member for member in members if member not in going]

    def _train_until(self, members: Sequence[SweepStudent], until: int | None) -> None:
        """Train students that have not failed for good until so many epochs are done, or to their end."""
        pending = [member for member in members if _is_pending(member, until)]
        refuse_inexact = self.recipe.inexact_targets == "refuse"
        groups = groups_of(pending, self.recipe.group_size, refuse_inexact, self.progress.refuse)
        if pending:
            logger.info(f"{len(pending)} students to train, on {len(groups)} streams")
        if self.spread is not None and groups:
            self.spread.train(groups, self.out, until, self.progress.show)
            return
        for group in groups:
            train_group(group, self.out, until, self.stop, self.progress.show)
            if self.stop:
                raise self.stop.stopped("stopped")


def _is_pending(member: SweepStudent, until: int | None) -> bool:
    """Return whether a run has epochs left to train: one that diverged would diverge again."""
    outcome = outcome_of(member)
    if outcome.state == "finished" or (outcome.failure is not None and outcome.failure.is_final):
        return False
    return until is None or outcome.epochs < until
