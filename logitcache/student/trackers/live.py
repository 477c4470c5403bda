"""Live trackers: each epoch of a run in training is written to its trackers as soon as it is recorded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from logitcache.config.recipe import read_recipe
from logitcache.config.yaml_text import flattened
from logitcache.errors import LogitCacheError, RecipeError
from logitcache.runtime.console import logger
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.trackers.base import Sink, TrackedRun, TrackerBase, write_rows


@contextmanager
def tracked(directory: RunDirectory, trackers: Sequence[TrackerBase]) -> Iterator[None]:
    """Write the rows of an opened run to trackers while the block runs, on the first rank alone.

    Epochs of earlier sessions come first. Raises RecipeError or MissingExtraError for a tracker that does not open. One
    that fails later is warned of, and gets what it lacks after the next epoch: training goes on, as metrics.jsonl has
    every row.
    """
    if not trackers:
        yield
        return
    followers: list[_Follower] = []
    try:
        directory.ranks.by_first(lambda: followers.extend(_Follower(directory, tracker) for tracker in trackers))
        directory.followers = [follower.write for follower in followers]
        for follower in followers:
            follower.write(directory.recorded())
        yield
    finally:
        directory.followers = []
        for follower in followers:
            follower.close(directory.recorded())


class _Follower:
    """An opened tracker, and how many rows of the run it has."""

    def __init__(self, directory: RunDirectory, tracker: TrackerBase) -> None:
        self._kind, self._path = tracker.extra, directory.path
        self._written, self._has_warned = 0, False
        recipe = dict(flattened(read_recipe(directory.path / "recipe.yaml")))
        try:
            self._sink: Sink = tracker.opened(TrackedRun(directory.path, directory.path.name, recipe))
        except LogitCacheError:
            raise
        except Exception as error:  # libraries of others raise anything
            raise RecipeError(
                f"trackers: {self._kind} does not open: {_reason(error)}. Fix: what it names, or leave it out and run "
                f"`{self._later}` after training"
            ) from error

    @property
    def _later(self) -> str:
        return f"logitcache log {self._path} --to {self._kind}"

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows that the tracker lacks; warn of the first failure."""
        try:
            for row in rows[self._written :]:
                write_rows(self._sink, [row])
                self._written += 1
        except Exception as error:
            if not self._has_warned:
                logger.warning(
                    f"{self._path}: {self._kind} fails after {self._written} of {len(rows)} epochs: {_reason(error)}. "
                    "Training goes on; every epoch tries to write what is missing"
                )
            self._has_warned = True

    def close(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Close the tracker; report epochs that it lacks."""
        try:
            self._sink.close()
        except Exception as error:
            logger.warning(f"{self._path}: {self._kind} does not close: {_reason(error)}")
        if self._written < len(rows):
            lacks = f"lacks {len(rows) - self._written} of {len(rows)} epochs"
            logger.warning(f"{self._path}: {self._kind} {lacks}. Fix: {self._later}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
