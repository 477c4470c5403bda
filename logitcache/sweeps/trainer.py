"""Train the students of a sweep rung by rung, in groups that share batches, here or on a cluster."""

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
    """Train the students of a sweep on `workers`, or in this process if that is None."""

    recipe: SweepRecipe
    out: Path
    workers: SweepWorkers | None
    stop: StopFlag
    progress: SweepProgress
    costs: ArchitectureCosts

    def train(self, members: Sequence[SweepStudent], halving: Halving | None) -> list[SweepStudent]:
        """Train students to their last epoch; return those that halving dropped. Raises Stopped."""
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
        """Train the pending students up to a number of epochs, or to their last."""
        pending = [member for member in members if _is_pending(member, until)]
        refuse_inexact = self.recipe.inexact_targets == "refuse"
        groups = groups_of(pending, self.recipe.group_size, refuse_inexact, self.progress.refuse)
        if pending:
            logger.info(f"{len(pending)} students to train, on {len(groups)} streams")
        if self.workers is not None and groups:
            self.workers.train(groups, self.out, until, self.progress.show)
            return
        for group in groups:
            train_group(group, self.out, until, self.stop, self.progress.show)
            if self.stop:
                raise self.stop.stopped("stopped")


def _is_pending(member: SweepStudent, until: int | None) -> bool:
    """Whether a run has epochs left to train; not after divergence, which would recur."""
    outcome = outcome_of(member)
    if outcome.state == "finished" or (outcome.failure is not None and outcome.failure.is_final):
        return False
    return until is None or outcome.epochs < until
