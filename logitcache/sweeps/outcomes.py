"""Outcomes: how the runs of a sweep ended, as their folders record it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from logitcache.errors import DivergenceError, LogitCacheError
from logitcache.store.files import refused_by_system, write_atomically
from logitcache.store.safe_files import read_bounded
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import RunResult
from logitcache.sweeps.cells import SweepStudent

RunState = Literal["finished", "failed", "paused", "waiting"]
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Failure:
    """Why a run ended before its time: class, message and exit code of the error."""

    error: str
    message: str
    exit_code: int

    @property
    def is_final(self) -> bool:
        """Whether the same command would meet the same error again: a divergence repeats bit for bit."""
        return self.error == DivergenceError.__name__


@dataclass(frozen=True)
class Outcome:
    """How a run stands: its result if it is finished, and the metrics of its epochs."""

    state: RunState
    epochs: int
    result: RunResult | None = None
    failure: Failure | None = None
    rows: tuple[dict[str, Any], ...] = ()


_FAILURE = TypeAdapter(Failure)


def record_failure(run: Path, error: Exception) -> Failure:
    """Write `failure.json` into a run's folder."""
    error = refused_by_system(error)
    code = error.exit_code if isinstance(error, LogitCacheError) else 1
    failure = Failure(type(error).__name__, str(error) or type(error).__name__, code)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "failure.json", json.dumps(asdict(failure), indent=2).encode())
    return failure


def forget_failure(run: Path) -> None:
    """Remove `failure.json`: the run goes on."""
    (run / "failure.json").unlink(missing_ok=True)


def outcome_of(member: SweepStudent) -> Outcome:
    """Read how a run stands. Raises CacheError for a damaged run."""
    run = Path(member.recipe.out)
    directory = RunDirectory(str(run))
    rows = tuple(directory.recorded())
    result = directory.finished(RunResult)
    if result is not None and result.epochs >= member.recipe.epochs:
        return Outcome("finished", len(rows), result, rows=rows)
    try:
        failure = _FAILURE.validate_json(read_bounded(run / "failure.json", _MAX_BYTES))
        return Outcome("failed", len(rows), failure=failure, rows=rows)
    except (FileNotFoundError, ValidationError):
        return Outcome("paused" if rows else "waiting", len(rows), rows=rows)
