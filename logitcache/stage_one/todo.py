"""The work of stage one: compare a cache with the recipe, before anything is written."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from logitcache.cache.cache import Cache
from logitcache.cache.format.appended import Appended
from logitcache.cache.format.derivation import require_not_derived
from logitcache.cache.format.growth import GROWING_IDS, grown, read_growth
from logitcache.cache.format.layout import CHECKSUMS, Layout
from logitcache.cache.format.manifest import Manifest, TeacherEntry
from logitcache.cache.format.manifest_diff import extends, is_more, require_growth
from logitcache.cache.format.root import ROOT
from logitcache.cache.format.samples import Samples, recordable
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.read.row_sources import RecordedRows
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.replay import require_same_images
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.verify import damaged
from logitcache.cache.write.unreadable_images import with_repaired_images
from logitcache.classifier import PLAIN
from logitcache.models import weights_digest
from logitcache.runtime.console import logger
from logitcache.runtime.versions import machine_of, versions
from logitcache.stage_one.inputs import Inputs
from logitcache.stage_one.new_images import (
    appended_of,
    calibrated,
    canary_keys,
    first_of,
    require_images_alone,
    require_same_growth,
    with_ids,
)
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.targets import Targets
from logitcache.teacher.answers import examples_of
from logitcache.teacher.classes import other_classes
from logitcache.teacher.fitting import Tables, fit, refit_damaged_tables
from logitcache.teacher.speed import note_other_machine, settle_variants
from logitcache.teacher.teacher import Teacher, TeacherSource
from logitcache.views import canaries
from logitcache.views.datasets.arranged import ArrangedImages
from logitcache.views.datasets.base import ImageDataset, fingerprint, warn_of_orientation
from logitcache.views.keys import ViewKey


class Skeleton(NamedTuple):
    """A cache without its shards: the manifest before it grows, samples, and bytes of damaged tables by key."""

    manifest: Manifest
    samples: Samples
    repairs: Mapping[str, bytes]

    def grown_files(self, goal: Manifest) -> dict[str, bytes]:
        """Return the files of samples of the images of `goal`, by key; empty if no images are appended."""
        return self.samples.of(goal).files() if goal.num_images != self.manifest.num_images else {}

    def growing_ids(self, goal: Manifest) -> dict[str, bytes]:
        """Return the file of the ids of the images of `goal`, by key; empty if no images are appended."""
        return {GROWING_IDS: self.samples.ids} if goal.num_images != self.manifest.num_images else {}


@dataclass(frozen=True)
class Todo:
    """The goal, as a snapshot of the finished cache, and the missing shards of each group of arrays, by its name.

    damaged: keys of commit records to remove. num_recorded: number of views with recorded pixels. tables: new tables
    by array name, not written yet. recorded: the manifest of an existing cache. skeleton: None on a worker, which only
    computes shards.
    """

    snapshot: Snapshot
    missing: Mapping[str, AbstractSet[Shard]] = field(default_factory=dict)
    damaged: Sequence[str] = ()
    num_recorded: int = 0
    tables: Tables = field(default_factory=dict)
    recorded: Manifest | None = None
    skeleton: Skeleton | None = None

    @classmethod
    def compare(
        cls,
        snapshot: Snapshot,
        recorded: Manifest | None,
        skeleton: Skeleton,
        num_recorded: int = 0,
        tables: Tables | None = None,
    ) -> "Todo":
        """Find the shards that are not committed, or whose bytes differ from their records."""
        missing = {name: set(snapshot.layout.shards()) - there for name, there in snapshot.committed().items()}
        records = []
        for shard, group, text in damaged(snapshot):
            logger.info(f"to be written again: {text}")
            missing[group.name].add(shard)
            records.append(group.record_file(shard))
        return cls(snapshot, missing, records, num_recorded, tables or {}, recorded, skeleton)

    @property
    def store(self) -> Store:
        """The store of the cache."""
        return self.snapshot.store

    @property
    def goal(self) -> Manifest:
        """The manifest of the finished cache."""
        return self.snapshot.manifest

    @property
    def layout(self) -> Layout:
        """Arrays and shards of the finished cache."""
        return self.snapshot.layout

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards to compute, in order."""
        lacking: set[Shard] = set().union(*self.missing.values())
        return [shard for shard in self.layout.shards() if shard in lacking]

    @cached_property
    def codecs(self) -> TargetCodecs:
        """The encodings of its targets, also of tables that are not written yet."""
        return TargetCodecs(self.store, self.goal, self.layout, self.tables)

    @cached_property
    def checksums(self) -> RecordedRows | None:
        """Checksums of the recorded views; None if the cache keeps none."""
        arrays = {array.suffix: array for array in self.layout.views_arrays}
        return RecordedRows(self.snapshot.array(arrays[CHECKSUMS])) if CHECKSUMS in arrays else None

    def has_checksums(self, shard: Shard) -> bool:
        """Whether the checksums of a shard were recorded before."""
        views = self.layout.views
        return views is not None and self.snapshot.records[views.name].of(views.arrays[0].number_of(shard)) is not None


def find_todo(inputs: Inputs, most_rows: int | None = None, most_canaries: int | None = None) -> Todo:
    """Describe the recipe's new cache, or compare the existing one with the recipe; writes nothing.

    Encodings of new targets are fitted to at most `most_rows` calibration rows, and teachers answer at most
    `most_canaries`. Raises MismatchError if the recipe makes another cache.
    """
    if not (inputs.store.path / ROOT).exists():
        return _new(inputs, most_rows, most_canaries)
    recorded = Snapshot.read(inputs.store)
    require_not_derived(recorded.manifest, str(inputs.store))
    if recorded.manifest.num_images != len(inputs.views.dataset.ids) and not isinstance(
        inputs.views.dataset, ArrangedImages
    ):
        require_same_images(inputs.store, recorded.manifest, inputs.views.dataset)
    return _existing(inputs, recorded, most_rows, most_canaries)


class _Tried(NamedTuple):
    """The canaries and the teachers' answers to them; entries have no stored forms yet."""

    records: tuple[canaries.Canary, ...]
    samples: Samples
    examples: dict[str, Targets]
    entries: dict[str, TeacherEntry]


def _try_canaries(
    inputs: Inputs, keys: list[ViewKey], recorded: Mapping[str, TeacherEntry], most: int | None
) -> _Tried:
    """Run the teachers on the canaries, by the recorded variants of their networks; choose missing variants."""
    recipe, dataset = inputs.recipe, inputs.views.dataset
    records, pixels = canaries.take(inputs.views, keys)
    samples = Samples(dataset.labels, dataset.digests(), pixels.numpy())
    labels = torch.from_numpy(samples.labels[[key.index for key in keys]])
    settle_variants(inputs.teachers, recipe.teachers, recorded, pixels, labels, recipe.batch_size, most)
    examples = examples_of(inputs.teachers, pixels[:most], labels[:most], keys[:most])
    return _Tried(records, samples, examples, entries_of(inputs, examples))


def _new(inputs: Inputs, most_rows: int | None, most_canaries: int | None) -> Todo:
    recipe, count = inputs.recipe, len(inputs.views.dataset.ids)
    keys = canaries.choose(recipe.views.seed, count, recipe.views.num_views)
    tried = _try_canaries(inputs, keys, {}, most_canaries)
    entries, tables = fit(recipe, inputs.views, inputs.teachers, tried.entries, tried.examples, most_rows=most_rows)
    rows = choose_shard_rows(list(entries.values()), count, recipe.shard_rows)
    manifest = _manifest(inputs, fit_to_pages(entries, rows), tried, rows)
    snapshot = Snapshot.as_described(inputs.store, manifest)
    return Todo.compare(snapshot, None, Skeleton(manifest, tried.samples, {}), tables=tables)


def _existing(inputs: Inputs, recorded: Snapshot, most_rows: int | None, most_canaries: int | None) -> Todo:
    recipe, store, views, root = inputs.recipe, inputs.store, inputs.views, recorded.manifest
    growing = recorded.growing()
    keys = canary_keys(root, len(views.dataset.ids))
    tried = _try_canaries(inputs, keys, growing.manifest.teachers, most_canaries)
    note_other_machine(growing.manifest, inputs.device)
    samples = with_ids(tried.samples, views.dataset, root)
    shard_rows, appended = recipe.shard_rows or root.shard_rows, appended_of(root, samples)
    wanted = _manifest(inputs, tried.entries, tried, shard_rows, appended)
    wanted = wanted.model_copy(update={"views": recipe.views})
    require_images_alone(root, wanted, str(store))
    require_same_growth(growing.manifest, wanted, root, str(store))
    held: set[Shard] = set().union(*growing.committed().values())
    manifest = with_repaired_images(store, root, wanted, samples.digests, held)
    cache = Cache(growing.of(manifest))
    cache.require_dataset(first_of(views.dataset, manifest.num_images))
    goal = _goal(cache.snapshot, wanted)
    if manifest.canaries != wanted.canaries[: len(manifest.canaries)]:
        cache.require_canaries(views)

    sample = calibrated(views, root)

    def fit_again(entries: Mapping[str, TeacherEntry], num_views: int | None, rows: int) -> Tables:
        return fit(recipe, sample, inputs.teachers, entries, tried.examples, num_views, recorded_rows=rows)[1]

    skeleton = Skeleton(manifest, samples, refit_damaged_tables(store, goal, fit_again))
    tables: Tables = {}
    if is_more(goal, manifest):
        entries, tables = fit(recipe, sample, inputs.teachers, goal.teachers, tried.examples, most_rows=most_rows)
        goal = goal.model_copy(update={"teachers": fit_to_pages(entries, goal.shard_rows)})
    return Todo.compare(cache.snapshot.of(goal), root, skeleton, manifest.views.num_views, tables)


def _goal(cache: Snapshot, wanted: Manifest) -> Manifest:
    """Return the manifest of a cache after the recipe has run; raise MismatchError if it makes another cache."""
    store, recorded = cache.store, cache.manifest
    begun = read_growth(store, recorded)
    if extends(wanted, begun):
        return grown(recorded, begun, wanted)
    if extends(recorded, wanted) and (cache.complete or not is_more(recorded, wanted)):
        return recorded.restricted(wanted.views.num_views, wanted.targets)
    growing = (
        f" (growing to {begun.views.num_views} views by {', '.join(begun.teachers)}; "
        f"`logitcache gc {store} --growth` gives that up)"
    )
    require_growth(begun, wanted, f"{store}{growing if is_more(begun, recorded) else ''}")
    raise AssertionError("it neither extends the cache nor differs from it")


def _manifest(
    inputs: Inputs, entries: dict[str, TeacherEntry], tried: _Tried, shard_rows: int, appended: Appended | None = None
) -> Manifest:
    recipe, dataset, shape = inputs.recipe, inputs.views.dataset, tried.samples.canaries.shape
    warn_of_orientation(dataset)
    return Manifest(
        dataset=recipe.dataset,
        fingerprint=fingerprint(dataset),
        # Canaries may lie in views beyond those of this recipe.
        views=recipe.views.model_copy(
            update={"num_views": max(recipe.views.num_views, *(record.view + 1 for record in tried.records))}
        ),
        image_shape=(shape[1], shape[2], shape[3]),
        shard_rows=shard_rows,
        row_checksums=recipe.row_checksums,
        parameters=recipe.views.columns() if recipe.record_parameters else None,
        teachers=entries,
        canaries=tried.records,
        versions=versions() | (machine_of(inputs.device) if any(entry.speed for entry in entries.values()) else {}),
        class_names=recordable(dataset.class_names),
        appended=appended,
    )


def entries_of(inputs: Inputs, examples: Mapping[str, Targets]) -> dict[str, TeacherEntry]:
    """Return the entries of the teachers, without stored forms."""
    return {
        teacher.name: _entry(
            inputs.recipe.teachers[teacher.name], teacher, inputs.views.dataset, examples[teacher.name]
        )
        for teacher in inputs.teachers
    }


def _entry(source: TeacherSource, teacher: Teacher, dataset: ImageDataset, examples: Targets) -> TeacherEntry:
    num_classes = examples.num_classes if examples.keeps_logits else None
    if num_classes is not None and dataset.num_classes not in (None, num_classes):
        raise other_classes(teacher.name, num_classes, dataset)
    return TeacherEntry(
        model=source.model.model_dump(mode="json") if source.model else None,
        weights=weights_digest(teacher.classifier.module),
        preprocessing=teacher.classifier.preprocessing,
        precision=source.precision,
        speed=None if teacher.variant == PLAIN else teacher.variant,
        num_classes=num_classes,
        classes=None if num_classes is None else teacher.classifier.classes,
        logits=source.logits,
        features=teacher.features,
    )
