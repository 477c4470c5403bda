"""Trackio: a run of a project in a database of this machine, which `trackio show` displays."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, TrackedRun, TrackerBase


class Trackio(TrackerBase):
    """Log metrics and the recipe to Trackio; nothing leaves the machine."""

    extra: ClassVar[str] = "trackio"

    kind: Literal["trackio"] = "trackio"
    project: str = Field(default="logitcache", description="Name of the project.")

    def open(self, run: TrackedRun) -> Sink:
        """Begin the run, or go on with it: its name has the id that is kept in its folder."""
        return _Run(self, run)


class _Run(Sink):
    def __init__(self, entry: Trackio, run: TrackedRun) -> None:
        import trackio

        note = run.note()
        self._run, self._last = run, note.get("trackio", -1)
        self._opened: Any = trackio.init(
            project=entry.project,
            name=f"{note.get('name', run.name)}-{note['id'][:6]}",  # the name that another session began it by
            config=dict(run.recipe),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step after the last one; earlier ones were logged by another session."""
        if step > self._last:
            self._opened.log(dict(values), step=step)
            self._last = step
            self._run.note_step("trackio", step)

    def close(self) -> None:
        """Wait until all is written."""
        self._opened.finish()
