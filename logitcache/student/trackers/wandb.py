"""Weights & Biases: a run of a project, online or in files that `wandb sync` uploads."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, TrackedRun, TrackerBase


class WandB(TrackerBase):
    """Log metrics and the recipe to Weights & Biases."""

    extra: ClassVar[str] = "wandb"

    kind: Literal["wandb"] = "wandb"
    project: str = Field(default="logitcache", description="Name of the project.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline writes files in RUN/wandb alone, which `wandb sync` uploads."
    )

    def open(self, run: TrackedRun) -> Sink:
        """Begin the run, or go on with it: its id is kept in its folder."""
        return _Run(self, run)


class _Run(Sink):
    def __init__(self, entry: WandB, run: TrackedRun) -> None:
        import wandb

        note = run.note()
        self._run, self._last = run, note.get("wandb", -1)
        self._opened: Any = wandb.init(
            project=entry.project,
            id=note["id"],
            name=run.name,
            dir=str(run.path),
            config=dict(run.recipe),
            resume="allow",
            mode=entry.mode,
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step after the last one; earlier ones were logged by another session."""
        if step > self._last:
            self._opened.log(dict(values), step=step, commit=True)
            self._last = step
            self._run.note_step("wandb", step)

    def close(self) -> None:
        """Wait until all is written."""
        self._opened.finish()
