"""Weights & Biases: a run of a project, online or in files that `wandb sync` uploads."""

from typing import ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, StepSink, TrackedRun, TrackerBase


class WandB(TrackerBase):
    """Log metrics and the recipe to Weights & Biases."""

    extra: ClassVar[str] = "wandb"

    kind: Literal["wandb"] = "wandb"
    project: str = Field(default="logitcache", description="Name of the project.")
    mode: Literal["online", "offline"] = Field(
        default="online", description="`offline` only writes files in RUN/wandb, which `wandb sync` uploads."
    )

    def open(self, run: TrackedRun) -> Sink:
        """Begin the run, or go on with it: its id is kept in its folder."""
        import wandb

        note = run.note()
        opened = wandb.init(
            project=self.project,
            id=note["id"],
            name=run.name,
            dir=str(run.path),
            config=dict(run.recipe),
            resume="allow",
            mode=self.mode,
            settings=wandb.Settings(silent=True),
        )
        return StepSink(run, "wandb", lambda values, step: opened.log(values, step=step, commit=True), opened.finish)
