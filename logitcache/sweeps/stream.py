"""Train a group of students on one stream, and record how each of them ends and what sharing saved."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from logitcache.errors import Stopped
from logitcache.runtime.console import logger
from logitcache.runtime.stopping import StopFlag
from logitcache.store.safe_files import read_bounded
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.training import Watcher, train_together
from logitcache.student.training_recipes import TrainingRecipe
from logitcache.sweeps.groups import Group, consecutive_parts, noted
from logitcache.sweeps.outcomes import Failure, forget_failure, record_failure
from logitcache.targets import Batch

_MAX_BYTES = 64 << 20
ShowEpoch = Callable[[str, dict[str, Any] | Failure], object]
"""Shows what a run measured after an epoch, or why it failed, by the name of its folder."""


@dataclass(frozen=True)
class Sharing:
    """What students of one stream shared, and what each alone would have needed of it.

    Images are rendered once and trained on by each student; `seconds` are those in which students waited for batches,
    and `bytes` those of the teachers' answers that were read.
    """

    images: int = 0
    seconds: float = 0.0
    bytes: int = 0
    images_alone: int = 0
    seconds_alone: float = 0.0
    bytes_alone: int = 0

    def __add__(self, other: "Sharing") -> "Sharing":
        return Sharing(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


class _Recorder(Watcher):
    """Records failures in the runs' folders, and passes metrics on to be shown."""

    def __init__(self, show: ShowEpoch) -> None:
        self._show = show
        self.sharing = Sharing()

    def begins(self, directory: RunDirectory, resumes: bool) -> None:
        """Report nothing: runs of a sweep begin silently."""

    def failed(self, recipe: TrainingRecipe, error: Exception) -> None:
        """Record why a student ended."""
        self._show(Path(recipe.out).name, record_failure(Path(recipe.out), error))

    def ended_epoch(self, recipe: TrainingRecipe, row: dict[str, Any]) -> None:
        """Pass the metrics on."""
        self._show(Path(recipe.out).name, row)

    def shared(self, batch: Batch, students: int, seconds: float) -> None:
        """Add the cost of a batch, shared and as separate runs would have paid it."""
        images, read = len(batch), batch.target_bytes
        self.sharing += Sharing(images, seconds, read, images * students, seconds * students, read * students)


def train_group(group: Group, out: Path, until: int | None, stop: StopFlag | None, show: ShowEpoch) -> None:
    """Train the students of a group to their end, or until so many epochs are done; in parts, if it was killed.

    An error of the data, which all students share, is recorded for each of them. Raises Stopped.
    """
    for part in consecutive_parts(group):
        recorder = _Recorder(show)
        recipes = [member.recipe for member in part.members]
        for member in part.members:
            forget_failure(Path(member.recipe.out))
        try:
            with noted(part):
                train_together(recipes, recorder, until=until, stop=stop)
        except Stopped:
            raise
        except Exception as error:  # of the images or the cache
            for recipe in recipes:
                recorder.failed(recipe, error)
        finally:
            _add_sharing(out, group.name, recorder.sharing)


def _add_sharing(out: Path, name: str, sharing: Sharing) -> None:
    """Append to the group's own file what its students shared."""
    (out / "groups").mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(sharing)) + "\n").encode()
    with open(out / "groups" / f"{name}.jsonl", "ab", buffering=0) as file:  # in one write
        file.write(line)


def read_sharing(out: Path) -> Sharing:
    """Add up what all groups of a sweep shared; a line that a kill cut is left out."""
    form, total = TypeAdapter(Sharing), Sharing()
    for file in sorted((out / "groups").glob("*.jsonl")):
        for line in read_bounded(file, _MAX_BYTES).splitlines():
            try:
                total += form.validate_json(line)
            except ValidationError:
                logger.debug(f"{file}: a line is not whole")
    return total
