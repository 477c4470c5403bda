"""Groups: the students of a sweep that can share a stream of batches."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from logitcache.config.recipe import Component, Count
from logitcache.errors import KilledWorkerError, LogitCacheError, MismatchError
from logitcache.runtime.console import logger
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded
from logitcache.student.compatibility import inexact_targets
from logitcache.student.lesson import share_held_out
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.training_data import CachedData
from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.cells import SweepStudent

_SHARED = (
    *("cache", "dataset", "without", "pairing", "shuffled", "num_views", "replay", "verify", "drift_limits"),
    *("factories", "trust", "batch_size", "drop_last", "views_per_image", "sampling", "ensembles"),
    *("num_workers", "start_method", "device"),
)
"""The entries of a recipe that decide the batches, where they are made, and where they are moved."""
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Group:
    """Students that share a stream."""

    members: tuple[SweepStudent, ...]

    @property
    def name(self) -> str:
        """A name that depends on the runs alone."""
        return hashlib.sha256("\0".join(member.run for member in self.members).encode()).hexdigest()[:16]


def groups_of(
    members: Sequence[SweepStudent],
    size: int | None,
    refuse_inexact: bool,
    failed: Callable[[StudentRecipe, LogitCacheError], object],
) -> list[Group]:
    """Group students by what decides their batches, at most `size` together.

    `failed` is called for a student whose cache does not open or does not serve it. With `refuse_inexact` that
    includes targets whose error is above the bound at a temperature that its losses ask for.
    """
    opened: dict[str, CachedData] = {}
    by_stream: dict[str, list[SweepStudent]] = {}
    for member in members:
        try:
            key = _stream_key(member.recipe, opened, refuse_inexact)
        except LogitCacheError as error:
            failed(member.recipe, error)
        else:
            by_stream.setdefault(key, []).append(member)
    return [
        Group(tuple(alike[start : start + (size or len(alike))]))
        for alike in by_stream.values()
        for start in range(0, len(alike), size or len(alike))
    ]


def _stream_key(recipe: StudentRecipe, opened: dict[str, CachedData], refuse_inexact: bool) -> str:
    """Return what decides a student's batches: entries of its recipe, and what its run has begun with."""
    directory = RunDirectory(recipe.out)
    begun = directory.learns_from()
    entries: dict[str, Any] = {
        **recipe.model_dump(mode="json", include=set(_SHARED)),
        "order": recipe.seed if recipe.order_seed is None else recipe.order_seed,
        "begun": {key: begun.get(key) for key in ("num_views", "teachers", "num_images")} if begun else None,
    }
    opens = ("cache", "pairing", "shuffled", "num_views", "begun", "without", *(["dataset"] if recipe.without else []))
    where = json.dumps([entries[key] for key in opens])
    if where not in opened:
        opened[where] = CachedData.open(recipe, recipe.dataset, None, begun)
    data = opened[where]
    data.lesson(recipe)
    if refuse_inexact:
        for reason in inexact_targets(recipe.losses, recipe.ensembles, data.cache):
            raise MismatchError(reason)
    entries |= {
        "held_out": share_held_out(recipe),
        "num_views": data.num_views,
        "num_images": len(data.cache),
        "begun": list(data.cache.manifest.teachers),
    }
    # What a student reads decides among how many rows it is shuffled.
    return json.dumps([entries, data.read_by([recipe]).shuffle_block])


class _Together(Component):
    """The content of a run's `group.json`, which is there while the run trains: how many students train together."""

    students: Count


def _note(member: SweepStudent) -> Path:
    return Path(member.recipe.out) / "group.json"


def _students(member: SweepStudent) -> int | None:
    """Return beside how many students a run was when it was killed, itself included; None if it was not."""
    try:
        return _Together.model_validate_json(read_bounded(_note(member), _MAX_BYTES)).students
    except (FileNotFoundError, ValidationError):
        return None


def consecutive_parts(group: Group) -> list[Group]:
    """Return a group in the parts that train one after the other: as it is, unless it was killed as it trained.

    The system kills most often for want of memory: then half as many train together.
    """
    killed = [students for member in group.members if (students := _students(member)) is not None]
    count, limit = len(group.members), max(1, min(killed) // 2) if killed else len(group.members)
    if limit < count:
        logger.info(
            f"{min(killed)} students were killed as they trained together: now {limit} train at a time. "
            "Less memory: group_size, a smaller batch_size, fewer num_workers"
        )
    return [Group(group.members[start : start + limit]) for start in range(0, count, limit)]


@contextmanager
def noted(group: Group) -> Iterator[None]:
    """Note in each run's folder that the group trains, until the block ends in any way but a kill."""
    text = _Together(students=len(group.members)).model_dump_json().encode()
    for member in group.members:
        _note(member).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_note(member), text, sync=False)
    try:
        yield
    except KilledWorkerError:
        raise  # a process that renders was killed: so would be the same group again
    except BaseException:
        forget(group)
        raise
    forget(group)


def forget(group: Group) -> None:
    """Remove the notes that a group trains."""
    for member in group.members:
        _note(member).unlink(missing_ok=True)
