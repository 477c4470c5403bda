"""What stage one would do, found out as it does and without writing anything."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from logitcache.cache.format.commits import Records
from logitcache.cache.format.layout import Layout
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.manifest_diff import is_more
from logitcache.cache.format.shard_rows import fit_to_pages
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.reopening import require_sound_skeleton
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cache.verify import damaged
from logitcache.cache.write.claims import target_of
from logitcache.planning.timing import answered, by_row
from logitcache.runtime.console import logger
from logitcache.runtime.device import resolve_device, to_device
from logitcache.stage_one.inputs import as_given, as_recorded, build_teachers, open_images
from logitcache.stage_one.preparation import Plan, begin, standing
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.teacher.answers import PASSES, answers_of
from logitcache.teacher.calibration import rows_to_answer
from logitcache.teacher.fitting import Tables, fit
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views import canaries
from logitcache.views.spec import Views, require_one_size

CALIBRATION_SECONDS, FEWEST_ROWS = 20.0, 256
"""Calibration rows of a draft are as many as are answered in this time, and at least these."""


@dataclass(frozen=True)
class Draft:
    """A plan of what is to do to a cache, with the shards that each group of arrays lacks.

    calibration_rows: answered to fit encodings, of the `calibration_wanted` that stage one takes. opening, preparing:
    seconds that stage one spends before the first shard, the images' digests being remembered. teacher_passes: images
    that the teachers' networks will take, to be tried and to fit encodings too.
    """

    recipe: PrecomputeRecipe
    views: Views
    teachers: list[Teacher]
    plan: Plan
    missing: Mapping[str, AbstractSet[Shard]]
    recorded: Manifest | None
    calibration_rows: int
    calibration_wanted: int
    opening: float
    preparing: float
    teacher_passes: int


@contextlib.contextmanager
def drafted(
    recipe: PrecomputeRecipe, *, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> Iterator[Draft]:
    """Open what the recipe names and yield what `precompute` would do with it; raises as that does.

    Of a cache that is there only what it lacks is to do; one whose skeleton is damaged is a CacheError.
    """
    device, given, store = resolve_device(recipe.device), teachers or {}, locate(recipe.cache)
    recipe = as_given(as_recorded(recipe, store), given, dataset)
    _open_views(recipe, dataset)
    began = time.perf_counter()
    views = _open_views(recipe, dataset)
    opening = time.perf_counter() - began
    require_one_size(views)
    built = build_teachers(recipe, given, views, device)
    prepared = time.perf_counter() - began - opening
    with contextlib.ExitStack() as seen:
        for teacher in built:
            seen.callback(teacher.remove_taps)
        yield _draft(recipe, views, built, store, opening, prepared)


def _open_views(recipe: PrecomputeRecipe, dataset: object | None) -> Views:
    """Open the images; the second time their digests are remembered, as they are when stage one comes."""
    views = Views(open_images(recipe, dataset), recipe.views)
    views.dataset.digests()
    return views


def _draft(
    recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], store: Store, opening: float, prepared: float
) -> Draft:
    cold, warm = (_pace(recipe, views, teachers) for _ in range(2))
    pace, prepared = warm.row, prepared + max(0.0, cold.all - warm.all)
    most = max(FEWEST_ROWS, int(CALIBRATION_SECONDS / pace))
    is_new, began = target_of(store) != store.path, time.perf_counter()
    with answered(teachers) as answers:
        recorded, goal, tables, num_canaries, known = (_new if is_new else _grown)(recipe, views, teachers, store, most)
    preparing = prepared + time.perf_counter() - began
    used = wanted = passes = 0
    for name, batches in answers.batches.items():
        calibration = [(rows - num_canaries, clock) for rows, clock in batches if rows > num_canaries]
        if calibration:
            asked = _rows_wanted(goal, name)
            used, wanted = used + calibration[-1][0], wanted + asked
            passes += asked * next(teacher.passes_by_row for teacher in teachers if teacher.name == name)
            preparing += correction(calibration, asked, recipe.num_workers, pace)
    snapshot = Snapshot.as_described(store, goal, known)
    layout = snapshot.layout
    missing = {group.name: set(layout.shards()) for group in layout.groups} if is_new else _missing(snapshot)
    lacking: set[Shard] = set().union(*missing.values())
    pending = [shard for shard in layout.shards() if shard in lacking]
    plan = Plan(snapshot, TargetCodecs(store, goal, layout, tables), pending)
    passes += sum(_passes(teacher, layout, missing, num_canaries) for teacher in teachers)
    return Draft(recipe, views, teachers, plan, missing, recorded, used, wanted, opening, preparing, passes)


def _passes(teacher: Teacher, layout: Layout, missing: Mapping[str, AbstractSet[Shard]], num_canaries: int) -> int:
    """Return how many images a teacher will take for canaries and shards."""
    lacking: set[Shard] = set().union(*(missing[group.name] for group in layout.of(teacher.name)))
    return teacher.passes_by_row * (num_canaries + sum(shard.stop - shard.start for shard in lacking))


class _Goal(NamedTuple):
    """What a cache is and is to be, tables that are not written, a teacher's answers to canaries, and records."""

    recorded: Manifest | None
    goal: Manifest
    tables: Tables
    num_canaries: int
    records: Mapping[str, Records]


def _new(recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], store: Store, most: int) -> _Goal:
    store.require_vacant()
    manifest, _, tables = begin(recipe, views, teachers, most)
    return _Goal(None, manifest, tables, PASSES * len(manifest.canaries), {})


def _grown(recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], store: Store, most: int) -> _Goal:
    found = standing(store, recipe, views, teachers)
    require_sound_skeleton(store, found.recorded)
    goal, tables = found.goal, dict[str, Any]()
    if is_more(goal, found.cache.manifest):
        entries, tables = fit(recipe, views, teachers, goal.teachers, found.examples, most_rows=most)
        goal = goal.model_copy(update={"teachers": fit_to_pages(entries, goal.shard_rows)})
    return _Goal(found.recorded, goal, tables, PASSES * len(found.recorded.canaries), found.cache.records)


class _Pace(NamedTuple):
    """Seconds that some calibration rows take, all of them and each: rendered in one process, then answered."""

    all: float
    row: float


def _pace(recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher]) -> _Pace:
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


def _missing(snapshot: Snapshot) -> dict[str, set[Shard]]:
    """Return the shards of each group that are not committed, or whose bytes are no longer what was committed."""
    committed = snapshot.committed()
    for shard, group, text in damaged(snapshot):
        logger.info(f"to be written again: {text}")
        committed[group.name].discard(shard)
    every = set(snapshot.layout.shards())
    return {name: every - there for name, there in committed.items()}
