"""Prepare stage one as `precompute` does, without writing: the missing shards, and the seconds before the first one."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from logitcache.cache.format.root import read_manifest
from logitcache.cache.snapshot import require_sound_skeleton
from logitcache.cache.write.writer_locks import target_of
from logitcache.classifier import PLAIN
from logitcache.planning.timing import Quartiles, by_row, timed_answers
from logitcache.runtime.device import to_device
from logitcache.stage_one.inputs import Inputs, open_views, with_teachers
from logitcache.stage_one.todo import Todo, find_todo
from logitcache.store.shards import Shard
from logitcache.teacher import speed
from logitcache.teacher.answers import PASSES, answers_of
from logitcache.teacher.calibration import rows_to_answer
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views import canaries
from logitcache.views.view_sizes import require_one_size

CALIBRATION_SECONDS, FEWEST_ROWS = 20.0, 256
"""A dry run takes as many calibration rows as are answered in this time, and at least these."""

PACED = 4
"""Canaries that are answered: twice before all else, once cold, to measure the pace; then as stage one answers all."""


@dataclass(frozen=True)
class DryRun:
    """What stage one would do to a cache, and how long it takes before the first shard.

    calibration_rows: answered to fit encodings, of the `calibration_wanted` that stage one takes. opening: seconds to
    open the images, their digests being remembered. preparing: seconds from there to the first shard, estimated if
    calibration was cut short; without the `canaries_left_out`, answers of all teachers at about `pace` seconds that
    stage one takes besides. teacher_passes: images that the teachers' networks will take, calibration included.
    """

    inputs: Inputs
    todo: Todo
    calibration_rows: int = 0
    calibration_wanted: int = 0
    opening: float = 0.0
    preparing: Quartiles = field(default_factory=lambda: np.zeros(3))
    teacher_passes: int = 0
    canaries_left_out: float = 0.0
    pace: float = 0.0


@contextlib.contextmanager
def dry_run(
    recipe: PrecomputeRecipe, *, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> Iterator[DryRun]:
    """Open the inputs, compare the cache with the recipe, and calibrate; raises as `precompute` does.

    Of an existing cache only what it lacks is to do; one whose skeleton is damaged is a CacheError.
    """
    given = teachers or {}
    open_views(recipe, given, dataset)[2].dataset.digests()
    began = time.perf_counter()
    # The second time digests are remembered, as stage one finds them.
    recipe, store, views = open_views(recipe, given, dataset)
    require_one_size(views)
    views.dataset.digests()
    opening, began = time.perf_counter() - began, time.perf_counter()
    with with_teachers(recipe, store, views, given) as inputs:
        yield _prepare(inputs, opening, began)


def _prepare(inputs: Inputs, opening: float, began: float) -> DryRun:
    store, teachers, num_workers = inputs.store, inputs.teachers, inputs.recipe.num_workers
    _seconds_by_row(inputs)  # cold, as in stage one
    pace, warm = _seconds_by_row(inputs)
    if target_of(store) != store.path:
        store.require_vacant()
    else:
        require_sound_skeleton(store, read_manifest(store))
    with timed_answers(teachers) as answers:
        todo = find_todo(inputs, max(FEWEST_ROWS, int(CALIBRATION_SECONDS / pace)), PACED)
    # Stage one is cold once, too, but at the first of its canaries: it lacks two warm passes over these few.
    preparing = np.full(3, time.perf_counter() - began - 2 * warm)
    num_canaries, num_rows = len(todo.goal.canaries), todo.goal.num_images * todo.goal.views.num_views
    num_answered = min(PACED, num_canaries)
    left_out = (num_canaries - num_answered) * statistics.mean(_canary_passes(inputs, todo, one) for one in teachers)
    used = wanted = passes = 0
    for teacher in teachers:
        batches = [(rows - num_answered, at) for rows, at in answers.batches[teacher.name] if rows > num_answered]
        if batches:
            asked = min(rows_to_answer(todo.goal.teachers[teacher.name].num_classes or 0, num_rows), num_rows)
            used, wanted = used + batches[-1][0], wanted + asked
            preparing += correction(batches, asked, num_workers, pace)
            passes += asked * teacher.passes_by_row
        missing: set[Shard] = set().union(*(todo.missing[group.name] for group in todo.layout.of(teacher.name)))
        passes += teacher.passes_by_row * (PASSES * num_canaries + todo.layout.num_new(missing))
    return DryRun(inputs, todo, used, wanted, opening, np.maximum(preparing, 0.0), passes, left_out, pace)


def _canary_passes(inputs: Inputs, todo: Todo, teacher: Teacher) -> int:
    """Return how often stage one has a teacher answer the canaries that a dry run leaves out."""
    if teacher.answers_by_key:
        return 1
    is_recorded = todo.recorded is not None and teacher.name in todo.recorded.teachers
    chosen_by_time = inputs.recipe.teachers[teacher.name].speed == "auto" and not is_recorded  # of all canaries
    return PASSES + (0 if teacher.variant == PLAIN or chosen_by_time else speed.PASSES)


def _seconds_by_row(inputs: Inputs) -> tuple[float, float]:
    """Render and answer a few canaries in this process; return the seconds by row, and in all."""
    recipe, views = inputs.recipe, inputs.views
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)[:PACED]
    began = time.perf_counter()
    pixels = views.answered().__getitems__(keys)
    with timed_answers(inputs.teachers):  # waits for the device
        labels = torch.from_numpy(views.dataset.labels[[key.index for key in keys]])
        for teacher in inputs.teachers:
            answers_of(teacher, to_device(pixels, teacher.device), to_device(labels, teacher.device), keys)
    seconds = time.perf_counter() - began
    return max(seconds / len(keys), 1e-9), seconds


def correction(batches: Sequence[tuple[int, float]], wanted: int, num_workers: int, pace: float) -> Quartiles:
    """Return how much longer calibration takes in stage one, on `wanted` rows at a steady pace, than it took here.

    batches: rows, and the time, after each batch of one teacher. pace: seconds by row, if there is only one batch.
    """
    (first, began), (_, ended) = batches[0], batches[-1]
    row = by_row(batches, num_workers)[1] if len(batches) > 1 else np.full(3, pace)
    return (wanted - first) * row - (ended - began)
