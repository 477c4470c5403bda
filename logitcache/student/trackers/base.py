"""What trackers share: a run's rows in, each step written once, however often a run is resumed or exported."""

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from logitcache.config.recipe import Component
from logitcache.errors import needs_extra
from logitcache.store.files import write_atomically
from logitcache.student.runs.run_directory import RunDirectory

_NOTE = "tracking.json"
_FORM: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, int | str])
_PLACES = ("epoch", "step")


@dataclass(frozen=True)
class TrackedRun:
    """A run's folder, the name that it is shown by, and its recipe by dotted key."""

    path: Path
    name: str
    recipe: Mapping[str, Any]

    def note(self) -> dict[str, Any]:
        """Read the note of earlier exports: an id and a name for services, and by kind of tracker the last step."""
        if (self.path / _NOTE).exists():
            return RunDirectory(str(self.path)).parsed(self.path / _NOTE, _FORM)
        found: dict[str, Any] = {"id": secrets.token_hex(8), "name": self.name}
        self._write(found)
        return found

    def note_step(self, kind: str, step: int) -> None:
        """Note the last step that a kind of tracker has."""
        self._write(self.note() | {kind: step})

    def _write(self, note: dict[str, Any]) -> None:
        write_atomically(self.path / _NOTE, json.dumps(note).encode())


class Sink(ABC):
    """An opened tracker of one run."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step; skip those that the tracker already has."""

    @abstractmethod
    def close(self) -> None:
        """Flush pending metrics and close."""


class StepSink(Sink):
    """A tracker that logs a whole step at once; the last one is noted in the run's folder, by kind of tracker."""

    def __init__(
        self, run: TrackedRun, kind: str, log: Callable[[dict[str, float], int], object], finish: Callable[[], object]
    ) -> None:
        self._run, self._kind, self._log, self._finish = run, kind, log, finish
        self._last = run.note().get(kind, -1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step after the last one; earlier ones were logged by another session."""
        if step > self._last:
            self._log(dict(values), step)
            self._last = step
            self._run.note_step(self._kind, step)

    def close(self) -> None:
        """Wait until all is written."""
        self._finish()


class TrackerBase(Component, ABC):
    """An entry of `trackers`; nothing of its library is imported before it is opened."""

    extra: ClassVar[str]

    @abstractmethod
    def open(self, run: TrackedRun) -> Sink:
        """Open the tracker for a run, new or written before. Raises ImportError without its library."""

    def opened(self, run: TrackedRun) -> Sink:
        """Open the tracker. Raises MissingExtraError."""
        with needs_extra(f"a tracker of kind {self.extra}", self.extra):
            return self.open(run)


def write_rows(sink: Sink, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of metrics.jsonl, at the optimiser step after which they were measured."""
    for row in rows:
        values = {name: float(v) for name, v in row.items() if name not in _PLACES and v is not None}
        sink.write(row["step"], values)
