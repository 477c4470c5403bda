"""Train many students from one cache, those that can on one stream."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from logitcache.config.recipe import dump_recipe
from logitcache.errors import CacheError, LogitCacheError, RecipeError, Stopped, rebuilt
from logitcache.runtime.console import logger
from logitcache.runtime.stopping import stop_flag
from logitcache.stage_one.cluster.cluster import HERE, Cluster
from logitcache.store.file_locks import locked
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded
from logitcache.student.compatibility import target_error
from logitcache.student.training_data import CachedData
from logitcache.sweeps.architecture_costs import ArchitectureCosts
from logitcache.sweeps.cells import SweepStudent, members_of
from logitcache.sweeps.cluster import SweepWorkers
from logitcache.sweeps.comparison.comparison import Comparison, compare
from logitcache.sweeps.outcomes import outcome_of
from logitcache.sweeps.progress import SweepProgress
from logitcache.sweeps.search.search import require_sound, search
from logitcache.sweeps.search.search_recipe import Optuna
from logitcache.sweeps.search.study import import_optuna
from logitcache.sweeps.search.trials import TrialResult
from logitcache.sweeps.stream import read_sharing
from logitcache.sweeps.sweep_recipe import SweepRecipe
from logitcache.sweeps.trainer import Trainer


@dataclass(frozen=True)
class SweepResult:
    """A sweep: how its students ended, the comparison of its cells, and what sharing saved.

    stopped: runs that halving ended. images_rendered: images that were read, decoded and augmented; images_trained:
    those that students stepped on, each of which would alone have been rendered. teacher_passes_saved: forward passes
    of teachers that training online would have taken. seconds_saved: seconds for which each student alone would have
    waited for its batches; bytes_saved: of the teachers' answers, those that were read once for several students.
    comparison: of the finalists of a search, if it has any; trials: of a search.
    """

    out: str
    students: int
    finished: int
    failed: dict[str, str]
    stopped: tuple[str, ...]
    orders: str
    images_rendered: int
    images_trained: int
    teacher_passes_saved: int
    seconds_saved: float
    bytes_saved: int
    comparison: Comparison
    trials: tuple[TrialResult, ...] = ()
    exit_code: int = 0


RESULT = "sweep.json"
"""The file of a sweep's folder that has its result, once it has ended."""
_FORM = TypeAdapter(SweepResult)
_MAX_BYTES = 64 << 20


def read_sweep(out: Path) -> SweepResult | None:
    """Read the result of the sweep of a folder; None if none has ended there. Raises CacheError if it is damaged."""
    try:
        return _FORM.validate_json(read_bounded(out / RESULT, _MAX_BYTES), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CacheError(f"{out / RESULT} is damaged: {reason}. Fix: the sweep's command again writes it") from error


def sweep(recipe: SweepRecipe, out: str | Path, cluster: Cluster = HERE) -> SweepResult:
    """Train all unfinished students of a sweep, and compare its cells.

    Runs are ordinary run folders in `out`/runs, bit for bit those that `train` makes from the same recipes. After a
    kill, the same call continues; finished runs are not trained again, and a group that the system killed is split. A
    divergence or error stops only its own student. Raises RecipeError if a cell is not a valid recipe, Stopped after
    SIGTERM or Ctrl-C.
    """
    out = Path(out)
    members = members_of(recipe, out)
    require_sound(recipe)
    cluster.checked()
    if isinstance(recipe.search, Optuna):
        import_optuna()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a sweep is one process, and starts its own. Fix: --workers N in place of torchrun")
    costs = ArchitectureCosts(out / "architectures", recipe.latency)
    with _locked(out), stop_flag() as stop, SweepProgress() as progress, SweepWorkers(cluster, stop) as workers:
        (out / RESULT).unlink(missing_ok=True)
        write_atomically(out / "sweep.yaml", dump_recipe(recipe).encode())
        trainer = Trainer(recipe, out, None if cluster.is_here else workers, stop, progress, costs)
        try:
            if recipe.search is not None:
                found = search(recipe, trainer)
                result = _result(recipe, found.members, found.compared, out, found.trials)
            else:
                logger.info(f"{len(members)} students of {len({m.cell for m in members})} cells; {_orders(members)}")
                trainer.train(members, recipe.halving)
                result = _result(recipe, members, members, out)
        except Stopped as error:
            raise _worded(error, out) from error
        write_atomically(out / RESULT, json.dumps(asdict(result), indent=2).encode())
    return result


def _orders(members: Sequence[SweepStudent]) -> str:
    """State whether seeds share the order of images, which is part of what they differ by if they do not."""
    orders = {m.recipe.seed if m.recipe.order_seed is None else m.recipe.order_seed for m in members}
    if len({member.seed for member in members}) == 1:
        return "one seed"
    if len(orders) == 1:
        return f"seeds share one order of images (order_seed {orders.pop()})"
    return "each seed has an order of images of its own (order_seed: 0 lets all seeds share one, and a stream)"


def _result(
    recipe: SweepRecipe,
    members: Sequence[SweepStudent],
    compared: Sequence[SweepStudent],
    out: Path,
    trials: tuple[TrialResult, ...] = (),
) -> SweepResult:
    outcomes = {member: outcome_of(member) for member in members}
    failures = {m.run: outcome.failure for m, outcome in outcomes.items() if outcome.failure is not None}
    damaged = {run for run, failure in failures.items() if failure.exit_code == CacheError.exit_code}
    whole = [member for member in compared if member.run not in damaged]
    sharing, done = read_sharing(out), [outcome.result for outcome in outcomes.values() if outcome.result is not None]
    return SweepResult(
        out=str(out),
        students=len(members),
        finished=len(done),
        failed={run: f"{failure.error}: {failure.message}" for run, failure in failures.items()},
        stopped=tuple(member.run for member in members if outcomes[member].state == "paused"),
        orders=_orders(compared or members),
        images_rendered=sharing.images,
        images_trained=sharing.images_alone,
        teacher_passes_saved=sharing.images_alone,
        seconds_saved=round(sharing.seconds_alone - sharing.seconds, 1),
        bytes_saved=sharing.bytes_alone - sharing.bytes,
        comparison=compare({m: outcomes[m] for m in compared}, recipe.baseline, _target_errors(whole)),
        trials=trials,
        exit_code=next((failure.exit_code for failure in failures.values()), 0),
    )


def _target_errors(members: Sequence[SweepStudent]) -> dict[str, float]:
    """Return the error of the targets that each cell learns from, by cell, where it is recorded."""
    errors: dict[str, float] = {}
    for member in members:
        student = member.recipe
        with contextlib.suppress(LogitCacheError):  # of a cache that is gone by now
            error = target_error(student.losses, student.ensembles, CachedData.open(student, None, None, {}).cache)
            errors |= {} if error is None else {member.cell: error}
    return errors


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep every other sweep out of a folder; the lock ends with the process."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, wait=False):
            yield
    except BlockingIOError as error:
        raise RecipeError(f"another sweep writes to {out}. Fix: wait, or name another folder") from error


def _worded(error: Stopped, out: Path) -> LogitCacheError:
    """Return a stop with what holds of a sweep; that of a killed process keeps its reason."""
    if type(error) is not Stopped:
        return error
    stopped = rebuilt(Stopped, f"stopped; every student's state is in {out}. The same command continues")
    stopped.exit_code = error.exit_code
    return stopped
