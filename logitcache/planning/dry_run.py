"""Prepare stage one as `precompute` does, without writing: what is to do, and how long it takes to the first shard.

`upper_bounds` needs shapes alone: no image is hashed, nothing is fitted or timed."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.encodings.features import FeatureForm
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.manifest import LOGITS, Manifest, StoredFeature, StoredLogits, TeacherEntry, recordable
from logitcache.cache.format.metadata import read_manifest
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.snapshot import Snapshot, require_sound_skeleton
from logitcache.cache.write.writer_locks import target_of
from logitcache.runtime.device import synchronize, to_device
from logitcache.runtime.versions import versions
from logitcache.stage_one.inputs import Inputs, open_views, with_teachers
from logitcache.stage_one.todo import Todo, entries_of, find_todo
from logitcache.store.base import Shard
from logitcache.teacher.answers import PASSES, answers_of
from logitcache.teacher.calibration import rows_to_answer
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views import canaries
from logitcache.views.datasets.base import Fingerprint, is_multi_label, names_digest
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, require_one_size

Quartiles = NDArray[np.float64]
"""[3]: lower quartile, median and upper quartile of a measurement, as others may use the machine meanwhile."""

NOT_READ = "0" * 64
"""In place of digests, which would read every image."""

CALIBRATION_SECONDS, FEWEST_ROWS = 20.0, 256
"""A dry run takes as many calibration rows as are answered in this time, and at least these."""


def by_row(marks: Sequence[Sequence[float]], num_workers: int) -> list[Quartiles]:
    """Return the quartiles of what each row adds to sums that were noted after batches, the first sum being the rows.

    At least two batches were noted; the first ones, which find everything cold, are left out.
    """
    warm = min(1 + 2 * num_workers, (len(marks) - 1) // 2)
    # Batches come in turns from the processes that render: as many are taken together.
    together = max(1, min(num_workers, (len(marks) - 1 - warm) // 2))
    sums = np.array(marks)[warm::together]
    steps = np.diff(sums, axis=0)
    return list(np.quantile(steps / steps[:, :1], (0.25, 0.5, 0.75), axis=0).T)


class AnswerTimes:
    """The seconds in which all teachers answered; by teacher, the rows and the time after each batch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.batches: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)


@contextlib.contextmanager
def timed_answers(teachers: Sequence[Teacher]) -> Iterator[AnswerTimes]:
    """Time the answers of teachers within the block, each with its device's queue empty before and after."""
    times, began = AnswerTimes(), 0.0

    def before(teacher: Any, inputs: tuple[Tensor, Tensor]) -> None:
        nonlocal began
        synchronize(inputs[0].device)
        began = time.perf_counter()

    def after(teacher: Any, inputs: tuple[Tensor, Tensor], answers: Any) -> None:
        synchronize(inputs[0].device)
        now, batches = time.perf_counter(), times.batches[teacher.name]
        times.seconds += now - began
        batches.append(((batches[-1][0] if batches else 0) + len(inputs[0]), now))

    with contextlib.ExitStack() as hooks:
        for teacher in teachers:
            hooks.callback(teacher.register_forward_pre_hook(before).remove)
            hooks.callback(teacher.register_forward_hook(after).remove)
        yield times


@dataclass(frozen=True)
class DryRun:
    """What stage one would do to a cache, and how long it takes before the first shard.

    calibration_rows: answered to fit encodings, of the `calibration_wanted` that stage one takes. opening: seconds to
    open the images, their digests being remembered. preparing: seconds from there to the first shard, estimated if
    calibration was cut short. teacher_passes: images that the teachers' networks will take, calibration included.
    """

    inputs: Inputs
    todo: Todo
    calibration_rows: int = 0
    calibration_wanted: int = 0
    opening: float = 0.0
    preparing: Quartiles = field(default_factory=lambda: np.zeros(3))
    teacher_passes: int = 0


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
        todo = find_todo(inputs, max(FEWEST_ROWS, int(CALIBRATION_SECONDS / pace)))
    # Stage one answers canaries once less cold and once less warm.
    preparing = np.full(3, time.perf_counter() - began - 2 * warm)
    num_canaries, num_rows = PASSES * len(todo.goal.canaries), todo.goal.num_images * todo.goal.views.num_views
    used = wanted = passes = 0
    for teacher in teachers:
        batches = [(rows - num_canaries, at) for rows, at in answers.batches[teacher.name] if rows > num_canaries]
        if batches:
            asked = min(rows_to_answer(todo.goal.teachers[teacher.name].num_classes or 0, num_rows), num_rows)
            used, wanted = used + batches[-1][0], wanted + asked
            preparing += correction(batches, asked, num_workers, pace)
            passes += asked * teacher.passes_by_row
        missing: set[Shard] = set().union(*(todo.missing[group.name] for group in todo.layout.of(teacher.name)))
        passes += teacher.passes_by_row * (num_canaries + sum(shard.stop - shard.start for shard in missing))
    return DryRun(inputs, todo, used, wanted, opening, np.maximum(preparing, 0.0), passes)


def _seconds_by_row(inputs: Inputs) -> tuple[float, float]:
    """Render and answer the canaries in this process; return the seconds by row, and in all."""
    recipe, views = inputs.recipe, inputs.views
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    began = time.perf_counter()
    pixels = views.answered().__getitems__(keys)
    with timed_answers(inputs.teachers):  # waits for the device
        labels = torch.from_numpy(views.dataset.labels[[key.index for key in keys]])
        for teacher in inputs.teachers:
            answers_of(teacher, to_device(pixels, teacher.device), to_device(labels, teacher.device))
    seconds = time.perf_counter() - began
    return max(seconds / len(keys), 1e-9), seconds


def correction(batches: Sequence[tuple[int, float]], wanted: int, num_workers: int, pace: float) -> Quartiles:
    """Return how much longer calibration takes in stage one, on `wanted` rows at a steady pace, than it took here.

    batches: rows, and the time, after each batch of one teacher. pace: seconds by row, if there is only one batch.
    """
    (first, began), (_, ended) = batches[0], batches[-1]
    row = by_row(batches, num_workers)[1] if len(batches) > 1 else np.full(3, pace)
    return (wanted - first) * row - (ended - began)


@contextlib.contextmanager
def upper_bounds(
    recipe: PrecomputeRecipe, *, teachers: Mapping[str, nn.Module] | None = None, dataset: object | None = None
) -> Iterator[DryRun]:
    """Open the inputs and yield the largest cache that the recipe may make; two images are answered, for shapes.

    An existing cache is not compared with images and teachers, nor its shards with their records.
    """
    with with_teachers(*open_views(recipe, teachers or {}, dataset), teachers or {}) as inputs:
        yield _bound(inputs)


def most_bytes(array: ArrayLayout) -> float:
    """Return the most bytes of a row of a packed array, without the index of its shard."""
    if array.per_shard:
        return array.stored_bounds(1)[1] - array.hot_bytes(0)
    rows = array.num_images % array.shard_rows or array.shard_rows  # of the smallest shard
    return array.row_bytes * (1 + 1 / 256) + 512 * -(-rows // array.inner_rows) / rows


def _bound(inputs: Inputs) -> DryRun:
    recipe, views, teachers, store = inputs.recipe, inputs.views, inputs.teachers, inputs.store
    pixels = views.answered().__getitems__([ViewKey(0, 0), ViewKey(0, min(1, len(views.dataset.ids) - 1))])
    labels = torch.from_numpy(views.dataset.labels[[0, min(1, len(views.dataset.ids) - 1)]])
    examples = {
        one.name: answers_of(one, to_device(pixels, one.device), to_device(labels, one.device)) for one in teachers
    }
    asked = entries_of(inputs, examples)
    is_new = target_of(store) != store.path
    cache = None if is_new else Snapshot.read(store)
    entries = {}
    for teacher in teachers:
        entry = asked[teacher.name]
        if cache is not None and teacher.name in cache.manifest.teachers:
            entry = entry.with_stored(cache.manifest.teachers[teacher.name])
        shapes = {name: tuple(values.shape[1:]) for name, values in examples[teacher.name].features.items()}
        entries[teacher.name] = _largest(entry, teacher, shapes)
    goal = _new(recipe, views, entries, pixels.shape) if cache is None else _grown(recipe, cache, entries)
    snapshot = Snapshot.as_described(store, goal, {} if cache is None else cache.records)
    every = set(snapshot.layout.shards())
    missing = {name: every - committed for name, committed in snapshot.committed().items()}
    return DryRun(inputs, Todo(snapshot, missing, recorded=None if cache is None else cache.manifest))


def _largest(entry: TeacherEntry, teacher: Teacher, shapes: Mapping[str, tuple[int, ...]]) -> TeacherEntry:
    """Choose the largest form of each target that has none yet."""
    logits, features, classes = entry.stored_logits, dict(entry.stored_features), entry.num_classes
    if LOGITS in entry.unfitted and entry.logits is not None and classes is not None:
        form = entry.logits.largest(teacher.classifier.module, classes)
        logits = StoredLogits.measured(form, entry.logits, tables=dict.fromkeys(form.table_shapes(classes), NOT_READ))
    for name in set(entry.unfitted) - {LOGITS}:
        asked = entry.features[name]
        kept = FeatureForm(dtype=asked.dtype, storage=asked.storage, channels=asked.channels)
        tables = dict.fromkeys(kept.table_shapes(shapes[name]), NOT_READ)
        features[name] = StoredFeature(shape=shapes[name], form=kept, tables=tables)
    return entry.model_copy(update={"stored_logits": logits, "stored_features": features})


def _new(recipe: PrecomputeRecipe, views: Views, entries: dict[str, TeacherEntry], shape: torch.Size) -> Manifest:
    dataset = views.dataset
    keys = canaries.choose(recipe.views.seed, len(dataset.ids), recipe.views.num_views)
    shard_rows = choose_shard_rows(list(entries.values()), len(dataset.ids), recipe.shard_rows)
    return Manifest(
        dataset=recipe.dataset,
        fingerprint=Fingerprint(  # of the size of the real one
            num_images=len(dataset.ids),
            num_classes=dataset.num_classes,
            multi_label=is_multi_label(dataset.labels),
            class_names=None if dataset.class_names is None else names_digest(dataset.class_names),
            **dict.fromkeys(("ids", "labels", "sizes", "content"), NOT_READ),
        ),
        views=recipe.views,
        image_shape=(shape[1], shape[2], shape[3]),
        shard_rows=shard_rows,
        row_checksums=recipe.row_checksums,
        parameters=recipe.views.columns() if recipe.record_parameters else None,
        teachers=fit_to_pages(entries, shard_rows),
        canaries=tuple(
            canaries.Canary(view=key.view, index=key.index, raw=NOT_READ, plan=NOT_READ, augmented=NOT_READ)
            for key in keys
        ),
        versions=versions(),
        class_names=recordable(dataset.class_names),
    )


def _grown(recipe: PrecomputeRecipe, cache: Snapshot, entries: dict[str, TeacherEntry]) -> Manifest:
    """Return the manifest that a cache grows to: more views, teachers and targets."""
    views = cache.manifest.views.model_copy(update={"num_views": recipe.views.num_views})
    packed = fit_to_pages(entries, cache.manifest.shard_rows)
    return cache.manifest.model_copy(update={"views": views, "teachers": packed})
