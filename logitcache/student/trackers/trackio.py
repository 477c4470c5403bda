"""Trackio: a run of a project in a database of this machine, which `trackio show` displays."""

from typing import ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, StepSink, TrackedRun, TrackerBase


class Trackio(TrackerBase):
    """Log metrics and the recipe to Trackio; nothing leaves the machine."""

    extra: ClassVar[str] = "trackio"

    kind: Literal["trackio"] = "trackio"
    project: str = Field(default="logitcache", description="Name of the project.")

    def open(self, run: TrackedRun) -> Sink:
        """Begin the run, or go on with it: its name has the id that is kept in its folder."""
        import trackio

        note = run.note()
        opened = trackio.init(
            project=self.project,
            name=f"{note.get('name', run.name)}-{note['id'][:6]}",  # the name that another session began it by
            config=dict(run.recipe),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return StepSink(run, "trackio", lambda values, step: opened.log(values, step=step), opened.finish)
