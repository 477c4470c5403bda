"""What stage one would do, found out as it does and without writing anything."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import read_manifest
from logitcache.cache.reopening import require_sound_skeleton
from logitcache.cache.write.writer_locks import target_of
from logitcache.planning.timing import answered, by_row
from logitcache.runtime.device import to_device
from logitcache.stage_one.inputs import Inputs, open_views, with_teachers
from logitcache.stage_one.todo import Todo, find_todo
from logitcache.store.shards import Shard
from logitcache.teacher.answers import PASSES, answers_of
from logitcache.teacher.calibration import rows_to_answer
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views import canaries

CALIBRATION_SECONDS, FEWEST_ROWS = 20.0, 256
"""Calibration rows of a draft are as many as are answered in this time, and at least these."""


@dataclass(frozen=True)
class Draft:
    """What stage one would do to a cache, and what that takes before the first shard.

    calibration_rows: answered to fit encodings, of the `calibration_wanted` that stage one takes. opening, preparing:
    seconds that stage one spends before the first shard, the images' digests being remembered. teacher_passes: images
    that the teachers' networks will take, to be tried and to fit encodings too.
    """

    inputs: Inputs
    todo: Todo
    calibration_rows: int = 0
    calibration_wanted: int = 0
    opening: float = 0.0
    preparing: float = 0.0
    teacher_passes: int = 0


@contextlib.contextmanager
def drafted(
    recipe: PrecomputeRecipe, *, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> Iterator[Draft]:
    """Open what the recipe names and yield what `precompute` would do with it; raises as that does.

    Of an existing cache only what it lacks is to do; one whose skeleton is damaged is a CacheError.
    """
    given = teachers or {}
    open_views(recipe, given, dataset)[2].dataset.digests()
    began = time.perf_counter()
    # The second time digests are remembered, as they are when stage one comes.
    recipe, store, views = open_views(recipe, given, dataset)
    views.dataset.digests()
    opening, began = time.perf_counter() - began, time.perf_counter()
    with with_teachers(recipe, store, views, given) as inputs:
        yield _draft(inputs, opening, time.perf_counter() - began)


def _draft(inputs: Inputs, opening: float, prepared: float) -> Draft:
    recipe, teachers, store = inputs.recipe, inputs.teachers, inputs.store
    cold, warm = (_pace(inputs) for _ in range(2))
    pace, prepared = warm.row, prepared + max(0.0, cold.all - warm.all)
    most = max(FEWEST_ROWS, int(CALIBRATION_SECONDS / pace))
    is_new, began = target_of(store) != store.path, time.perf_counter()
    if is_new:
        store.require_vacant()
    else:
        require_sound_skeleton(store, read_manifest(store))
    with answered(teachers) as answers:
        todo = find_todo(inputs, most)
    preparing = prepared + time.perf_counter() - began
    num_canaries = PASSES * len(todo.goal.canaries)
    used = wanted = passes = 0
    for name, batches in answers.batches.items():
        calibration = [(rows - num_canaries, clock) for rows, clock in batches if rows > num_canaries]
        if calibration:
            asked = _rows_wanted(todo.goal, name)
            used, wanted = used + calibration[-1][0], wanted + asked
            passes += asked * next(teacher.passes_by_row for teacher in teachers if teacher.name == name)
            preparing += correction(calibration, asked, recipe.num_workers, pace)
    passes += sum(_passes(teacher, todo, num_canaries) for teacher in teachers)
    return Draft(inputs, todo, used, wanted, opening, preparing, passes)


def _passes(teacher: Teacher, todo: Todo, num_canaries: int) -> int:
    """Return how many images a teacher will take for canaries and shards."""
    lacking: set[Shard] = set().union(*(todo.missing[group.name] for group in todo.layout.of(teacher.name)))
    return teacher.passes_by_row * (num_canaries + sum(shard.stop - shard.start for shard in lacking))


class _Pace(NamedTuple):
    """Seconds that some calibration rows take, all of them and each: rendered in one process, then answered."""

    all: float
    row: float


def _pace(inputs: Inputs) -> _Pace:
    recipe, views, teachers = inputs.recipe, inputs.views, inputs.teachers
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    began = time.perf_counter()
    pixels = views.answered().__getitems__(keys)
    with answered(teachers):  # waits for the device
        labels = torch.from_numpy(views.dataset.labels[[key.index for key in keys]])
        for teacher in teachers:
            answers_of(teacher, to_device(pixels, teacher.device), to_device(labels, teacher.device))
    seconds = time.perf_counter() - began
    return _Pace(seconds, max(seconds / len(keys), 1e-9))


def correction(batches: Sequence[tuple[int, float]], wanted: int, num_workers: int, pace: float) -> float:
    """Return how much longer than it took here calibration takes steadily, on as many rows as are wanted.

    batches: rows, and the time, after each batch of one teacher. pace: seconds by row, where there is only one batch.
    """
    (first, began), (_, ended) = batches[0], batches[-1]
    row = by_row(batches, num_workers)[1] if len(batches) > 1 else pace
    return (wanted - first) * row - (ended - began)


def _rows_wanted(goal: Manifest, teacher: str) -> int:
    """Return how many calibration rows stage one takes of a teacher."""
    num_rows = goal.num_images * goal.views.num_views
    return min(rows_to_answer(goal.teachers[teacher].num_classes or 0, num_rows), num_rows)
