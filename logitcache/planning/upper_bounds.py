"""Bound what stage one writes from shapes alone: no image is hashed, nothing is fitted or timed."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from logitcache.cache.encodings.features import FeatureForm
from logitcache.cache.format.appended import Appended
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.manifest import LOGITS, Manifest, StoredFeature, StoredLogits, TeacherEntry
from logitcache.cache.format.samples import packed_ids, recordable
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.writer_locks import target_of
from logitcache.planning.dry_run import DryRun
from logitcache.runtime.device import to_device
from logitcache.runtime.versions import versions
from logitcache.stage_one.inputs import Inputs, open_views, with_teachers
from logitcache.stage_one.todo import Todo, entries_of
from logitcache.teacher.answers import answers_of
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher
from logitcache.views import canaries
from logitcache.views.datasets.arranged import ArrangedImages
from logitcache.views.datasets.base import Fingerprint, is_multi_label, names_digest
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views

NOT_READ = "0" * 64
"""In place of digests, which would read every image."""


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
    keys = [ViewKey(0, 0), ViewKey(0, min(1, len(views.dataset.ids) - 1))]
    pixels = views.answered().__getitems__(keys)
    labels = torch.from_numpy(views.dataset.labels[[key.index for key in keys]])
    examples = {
        one.name: answers_of(one, to_device(pixels, one.device), to_device(labels, one.device), keys)
        for one in teachers
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
    if cache is None:
        snapshot = Snapshot.as_described(store, _new(recipe, views, entries, pixels.shape))
    else:
        snapshot = cache.of(_grown(recipe, cache, entries, views))
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


def _grown(recipe: PrecomputeRecipe, cache: Snapshot, entries: dict[str, TeacherEntry], opened: Views) -> Manifest:
    """Return the manifest that a cache grows to: more views, teachers and targets, or more images."""
    recorded, ids = cache.manifest, opened.dataset.ids
    views = recorded.views.model_copy(update={"num_views": recipe.views.num_views})
    packed = fit_to_pages(entries, recorded.shard_rows)
    grown = recorded.model_copy(update={"views": views, "teachers": packed})
    if not isinstance(opened.dataset, ArrangedImages) or len(ids) == recorded.num_images:
        return grown
    fingerprint = recorded.fingerprint.model_copy(update={"num_images": len(ids), "ids": NOT_READ})
    appended = Appended(first=recorded.first, id_bytes=len(packed_ids(ids)))
    return grown.model_copy(update={"fingerprint": fingerprint, "appended": appended})
