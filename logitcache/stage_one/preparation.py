"""Before the first shard: create the recipe's cache, or prove that it is the one to continue."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.cache.cache import Cache
from logitcache.cache.format.derivation import require_not_derived
from logitcache.cache.format.layout import CHECKSUMS, Layout, layout_of
from logitcache.cache.format.manifest import Manifest, TeacherEntry, recordable
from logitcache.cache.format.manifest_diff import extends, is_more, require_growth
from logitcache.cache.format.metadata import read_manifest, repair_skeleton
from logitcache.cache.format.samples import Samples
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.read.row_sources import RecordedRows
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.replay import require_same_images
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.verify import damaged
from logitcache.cache.write.claims import alone, preparing
from logitcache.cache.write.create import create_skeleton
from logitcache.cache.write.error_summary import finish_growth, note_errors
from logitcache.cache.write.growth import begin_growth, forget_growth, grown, read_growth
from logitcache.cache.write.unreadable_images import forget_unreadable, with_repaired_images
from logitcache.config.trust import inherit, remember
from logitcache.models import weights_digest
from logitcache.runtime.console import logger
from logitcache.runtime.versions import versions
from logitcache.store.base import Store
from logitcache.store.files import remove_leftovers
from logitcache.store.shards import Shard
from logitcache.targets import Targets
from logitcache.teacher.answers import examples_of
from logitcache.teacher.classes import other_classes
from logitcache.teacher.fitting import Tables, fit, mended_tables, table_files
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.teacher.teacher import Teacher, TeacherSource
from logitcache.views import canaries
from logitcache.views.datasets.base import ImageDataset, fingerprint, warn_of_orientation
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


@dataclass(frozen=True)
class Plan:
    """The cache as it is to be, what encodes it, the shards with something to do, and checksums that are there."""

    snapshot: Snapshot
    coders: TargetCodecs
    pending: list[Shard]
    num_recorded: int = 0
    checksums: RecordedRows | None = None

    @classmethod
    def of(cls, snapshot: Snapshot, pending: list[Shard], recorded: Snapshot | None = None) -> "Plan":
        """Return a plan to fill a cache; `recorded` is what is there already of one that grows."""
        coders = TargetCodecs(snapshot.store, snapshot.manifest, snapshot.layout)
        if recorded is None:
            return cls(snapshot, coders, pending)
        arrays = {array.suffix: array for array in recorded.layout.views_arrays}
        checksums = RecordedRows(recorded.array(arrays[CHECKSUMS])) if CHECKSUMS in arrays else None
        return cls(snapshot, coders, pending, recorded.layout.num_views, checksums)

    @property
    def store(self) -> Store:
        """Where the cache lies."""
        return self.snapshot.store

    @property
    def goal(self) -> Manifest:
        """What the cache is to be."""
        return self.snapshot.manifest

    @property
    def layout(self) -> Layout:
        """Its arrays and shards."""
        return self.snapshot.layout


def prepare(recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], target: Path, store: Store) -> Plan:
    """Create the cache, or prove that the recipe continues or extends it; returns what is to do."""
    if target == store.path:
        return _continue(store, recipe, views, teachers)
    manifest, samples, tables = begin(recipe, views, teachers)
    create_skeleton(target, store, manifest, samples, table_files(layout_of(manifest), tables))
    remember(manifest.digest())
    return new_plan(store, manifest)


def new_plan(store: Store, manifest: Manifest) -> Plan:
    """Return the plan of a cache that was just created: every shard is to do."""
    snapshot = Snapshot.as_described(store, manifest)
    return Plan.of(snapshot, list(snapshot.layout.shards()))


def begin(
    recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], most_rows: int | None = None
) -> tuple[Manifest, Samples, Tables]:
    """Describe a new cache, and fit what is to be fitted, to at most so many calibration rows; writes nothing."""
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    records, pixels = canaries.take(views, keys)
    samples = Samples(views.dataset.labels, views.dataset.digests(), pixels.numpy())
    examples = examples_of(teachers, pixels, torch.from_numpy(samples.labels[[key.index for key in keys]]))
    asked = entries_of(recipe, teachers, views.dataset, examples)
    entries, tables = fit(recipe, views, teachers, asked, examples, most_rows=most_rows)
    rows = choose_shard_rows(list(entries.values()), len(views.dataset.ids), recipe.shard_rows)
    return _manifest(recipe, views, fit_to_pages(entries, rows), records, pixels, rows), samples, tables


class Standing(NamedTuple):
    """An existing cache: what its root records and what is to be recorded, and what a recipe makes of it.

    What the recipe adds has no form yet.
    """

    recorded: Manifest
    cache: Snapshot
    goal: Manifest
    samples: Samples
    examples: Mapping[str, Targets]


def standing(store: Store, recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher]) -> Standing:
    """Refuse a recipe that asks for another cache than that in a store; writes nothing."""
    snapshot = Snapshot.read(store)
    recorded = snapshot.manifest
    require_not_derived(recorded, str(store))
    if recorded.num_images != len(views.dataset.ids):
        require_same_images(store, recorded, views.dataset)
    records, pixels = canaries.take(views, [ViewKey(canary.view, canary.index) for canary in recorded.canaries])
    samples = Samples(views.dataset.labels, views.dataset.digests(), pixels.numpy())
    labels = torch.from_numpy(samples.labels[[canary.index for canary in recorded.canaries]])
    examples = examples_of(teachers, pixels, labels)
    entries = entries_of(recipe, teachers, views.dataset, examples)
    wanted = _manifest(recipe, views, entries, records, pixels, recipe.shard_rows or recorded.shard_rows)
    wanted = wanted.model_copy(update={"views": recipe.views})
    begun = snapshot.growing()
    held: set[Shard] = set().union(*begun.committed().values())
    manifest = with_repaired_images(store, recorded, wanted, samples.digests, held)
    cache = Cache(begun.of(manifest))
    cache.require_dataset(views.dataset)
    goal = _goal(cache.snapshot, wanted)
    if manifest.canaries != wanted.canaries:
        cache.require_canaries(views)
    return Standing(recorded, cache.snapshot, goal, samples, examples)


def _continue(store: Store, recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher]) -> Plan:
    """Repair what is damaged of all but the shards of a cache, and begin to grow."""
    recorded, cache, goal, samples, examples = standing(store, recipe, views, teachers)
    manifest = cache.manifest
    tables = mended_tables(
        store,
        goal,
        lambda entries, count, rows: fit(recipe, views, teachers, entries, examples, count, recorded_rows=rows)[1],
    )
    for key in repair_skeleton(store, recorded, manifest, samples, tables):
        logger.info(f"writing again: {store}/{key}")
    inherit(recorded.digest(), manifest.digest())
    forget_unreadable(store)
    if alone(store):
        remove_leftovers(store.path)
    if is_more(goal, manifest):
        entries, added = fit(recipe, views, teachers, goal.teachers, examples)
        goal = goal.model_copy(update={"teachers": fit_to_pages(entries, goal.shard_rows)})
        begin_growth(store, goal, {**tables, **table_files(layout_of(goal), added)})
    filled = cache.of(goal)
    return Plan.of(filled, unfinished(filled), cache)


def _goal(cache: Snapshot, wanted: Manifest) -> Manifest:
    """Return the manifest of what a recipe makes of a cache; raise MismatchError where it is another cache's."""
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


def finish(plan: Plan) -> list[Shard]:
    """Let the root describe what the cache has grown to, once that is whole; returns the shards that are missing."""
    store = plan.store
    with preparing(store):
        # Other processes and machines have committed what this one has not.
        filled = plan.snapshot.refreshed() if plan.pending else plan.snapshot
        recorded = read_manifest(store)
        before = recorded.digest()
        committed = set(filled.shards)
        left = [shard for shard in filled.layout.shards() if shard not in committed]
        if not left and is_more(plan.goal, recorded) and extends(plan.goal, recorded):
            finish_growth(filled)
            recorded = plan.goal
        elif not left and (cache := filled.of(recorded)).complete:
            note_errors(cache)
        inherit(before, read_manifest(store).digest())
        forget_growth(store, recorded)
        if alone(store):
            remove_leftovers(store.path)
    return left


def _manifest(
    recipe: PrecomputeRecipe,
    views: Views,
    entries: dict[str, TeacherEntry],
    records: tuple[canaries.Canary, ...],
    pixels: Tensor,
    shard_rows: int,
) -> Manifest:
    warn_of_orientation(views.dataset)
    return Manifest(
        dataset=recipe.dataset,
        fingerprint=fingerprint(views.dataset),
        # Canaries may be of views that a recipe for less does not ask for.
        views=recipe.views.model_copy(
            update={"num_views": max(recipe.views.num_views, *(record.view + 1 for record in records))}
        ),
        image_shape=(pixels.shape[1], pixels.shape[2], pixels.shape[3]),
        shard_rows=shard_rows,
        row_checksums=recipe.row_checksums,
        parameters=recipe.views.columns() if recipe.record_parameters else None,
        teachers=entries,
        canaries=records,
        versions=versions(),
        class_names=recordable(views.dataset.class_names),
    )


def entries_of(
    recipe: PrecomputeRecipe, teachers: list[Teacher], dataset: ImageDataset, examples: Mapping[str, Targets]
) -> dict[str, TeacherEntry]:
    """Say who answers and what is asked for; how it is kept is not decided yet."""
    return {
        teacher.name: _entry(recipe.teachers[teacher.name], teacher, dataset, examples[teacher.name])
        for teacher in teachers
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
        num_classes=num_classes,
        classes=None if num_classes is None else teacher.classifier.classes,
        logits=source.logits,
        features=teacher.features,
    )


def unfinished(snapshot: Snapshot) -> list[Shard]:
    """List the shards to compute: those never committed, and those whose bytes are no longer what was committed."""
    done = set(snapshot.shards)
    for shard, group, text in damaged(snapshot):
        logger.info(f"writing again: {text}")
        snapshot.store.remove([group.record_file(shard)])
        done.discard(shard)
    return [shard for shard in snapshot.layout.shards() if shard not in done]
