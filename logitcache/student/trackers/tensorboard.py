"""TensorBoard: event files in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, TrackedRun, TrackerBase


class TensorBoard(TrackerBase):
    """Write scalars as event files: `tensorboard --logdir runs` shows them."""

    extra: ClassVar[str] = "tensorboard"

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str | None = Field(
        default=None,
        description="Folder for the event files of all runs, in a subfolder per run; by default `RUN/tensorboard`.",
        examples=["events"],
    )

    def open(self, run: TrackedRun) -> Sink:
        """Open a new event file beside those of earlier sessions."""
        return _Events(run.path / "tensorboard" if self.folder is None else Path(self.folder) / run.name)


class _Events(Sink):
    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        self._written: set[tuple[str, int]] = set()
        if folder.is_dir():
            # A stop may have come between two metrics of a step.
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            self._written = {(tag, one.step) for tag in events.Tags()["scalars"] for one in events.Scalars(tag)}
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars that no event file has."""
        for name, value in values.items():
            if (name, step) not in self._written:
                self._writer.add_scalar(name, value, step)
                self._written.add((name, step))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
