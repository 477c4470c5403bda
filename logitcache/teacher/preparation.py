"""Before the first shard: create the recipe's cache, or prove that it is the one to continue."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from logitcache.cache.arrays import Shard
from logitcache.cache.coders import Coders
from logitcache.cache.copies import place_of
from logitcache.cache.create import create_skeleton, read_manifest
from logitcache.cache.derivation import require_not_derived
from logitcache.cache.differences import extends, is_more, require_growth
from logitcache.cache.growth import begin_growth, finish_growth, forget_growth, grown, read_growth
from logitcache.cache.layout import CHECKSUMS, Layout, choose_shard_rows, layout_of
from logitcache.cache.locate import refresh
from logitcache.cache.manifest import Manifest, TeacherEntry
from logitcache.cache.reached import note_errors
from logitcache.cache.reader import Cache
from logitcache.cache.recorded import RecordedRows
from logitcache.cache.sharing import alone, preparing
from logitcache.cache.skeleton import Samples, mend_skeleton
from logitcache.cache.unreadable import forget_unreadable, with_mended_images
from logitcache.cache.verify import committed_by_group, committed_shards, damaged
from logitcache.console import say
from logitcache.errors import MismatchError, RecipeError
from logitcache.files import remove_leftovers
from logitcache.models import weights_digest
from logitcache.targets import Targets
from logitcache.teacher.fitting import Tables, examples_of, fit, mended_tables, table_files
from logitcache.teacher.models import Teacher, TeacherSource
from logitcache.teacher.recipes import PrecomputeRecipe
from logitcache.trust import inherit, remember
from logitcache.versions import versions
from logitcache.views import canaries
from logitcache.views.datasets import fingerprint
from logitcache.views.datasets.base import ImageDataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


@dataclass(frozen=True)
class Plan:
    """The cache as it is to be, what encodes it, the shards with something to do, and checksums that are there."""

    goal: Manifest
    layout: Layout
    coders: Coders
    pending: list[Shard]
    num_recorded: int = 0
    checksums: RecordedRows | None = None

    def at(self, path: Path) -> Self:
        """Return the same plan of a cache that is read at another path."""
        coders, checksums = Coders(path, self.goal, self.layout), self.checksums
        return replace(self, coders=coders, checksums=None if checksums is None else checksums.at(path))


def prepare(recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], target: Path, path: Path) -> Plan:
    """Create the cache, or prove that the recipe continues or extends it; returns what is to do."""
    if target == path:
        return _continue(path, recipe, views, teachers)
    manifest, samples, tables = begin(recipe, views, teachers)
    layout = layout_of(manifest)
    create_skeleton(target, path, manifest, samples, table_files(layout, tables))
    remember(manifest.digest())
    return Plan(manifest, layout, Coders(path, manifest, layout), list(layout.shards()))


def begin(
    recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher], most_rows: int | None = None
) -> tuple[Manifest, Samples, Tables]:
    """Describe a new cache, and fit what is to be fitted, to at most so many calibration rows; writes nothing."""
    keys = canaries.choose(recipe.views.seed, len(views.dataset.ids), recipe.views.num_views)
    records, pixels = canaries.take(views, keys)
    samples = Samples(views.dataset.labels, views.dataset.digests(), pixels.numpy())
    examples = examples_of(teachers, pixels, torch.from_numpy(samples.labels[[key.index for key in keys]]))
    asked = _entries(recipe, teachers, views.dataset, examples)
    entries, tables = fit(recipe, views, teachers, asked, examples, most_rows=most_rows)
    rows = choose_shard_rows(list(entries.values()), len(views.dataset.ids), recipe.shard_rows)
    return _manifest(recipe, views, entries, records, pixels, rows), samples, tables


class Standing(NamedTuple):
    """A cache that is there: what its root records and what is to be recorded, and what a recipe makes of it.

    What the recipe adds has no form yet.
    """

    recorded: Manifest
    manifest: Manifest
    goal: Manifest
    samples: Samples
    examples: Mapping[str, Targets]


def standing(path: Path, recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher]) -> Standing:
    """Refuse a recipe that asks for another cache than that at `path`; writes nothing."""
    recorded = read_manifest(path)
    require_not_derived(recorded, path)
    if recorded.num_images != len(views.dataset.ids):
        Cache(path, recorded).require_dataset(views.dataset)
    records, pixels = canaries.take(views, [ViewKey(canary.view, canary.index) for canary in recorded.canaries])
    samples = Samples(views.dataset.labels, views.dataset.digests(), pixels.numpy())
    labels = torch.from_numpy(samples.labels[[canary.index for canary in recorded.canaries]])
    examples = examples_of(teachers, pixels, labels)
    entries = _entries(recipe, teachers, views.dataset, examples)
    wanted = _manifest(recipe, views, entries, records, pixels, recipe.shard_rows or recorded.shard_rows)
    wanted = wanted.model_copy(update={"views": recipe.views})
    held = committed_by_group(path, layout_of(read_growth(path, recorded))).values()
    manifest = with_mended_images(path, recorded, wanted, samples.digests, set().union(*held))
    cache = Cache(path, manifest)
    cache.require_dataset(views.dataset)
    goal = _goal(cache, wanted)
    if manifest.canaries != wanted.canaries:
        cache.require_canaries(views)
    return Standing(recorded, manifest, goal, samples, examples)


def _continue(path: Path, recipe: PrecomputeRecipe, views: Views, teachers: list[Teacher]) -> Plan:
    """Mend what is damaged of all but the shards of a cache, and begin to grow."""
    recorded, manifest, goal, samples, examples = standing(path, recipe, views, teachers)
    tables = mended_tables(path, goal, lambda entries, count: fit(recipe, views, teachers, entries, examples, count)[1])
    for key in mend_skeleton(path, recorded, manifest, samples, tables):
        say(f"writing again: {place_of(path)}/{key}")
    inherit(recorded.digest(), manifest.digest())
    forget_unreadable(path)
    if alone(path):
        remove_leftovers(path)
    if is_more(goal, manifest):
        entries, added = fit(recipe, views, teachers, goal.teachers, examples)
        goal = goal.model_copy(update={"teachers": entries})
        require_whole_pages(path, goal, manifest)
        begin_growth(path, goal, {**tables, **table_files(layout_of(goal), added)})
    return _plan(Cache(path, manifest), goal)


def _goal(cache: Cache, wanted: Manifest) -> Manifest:
    """Return the manifest of what a recipe makes of a cache; raise MismatchError where it is another cache's."""
    path, recorded = cache.path, cache.manifest
    begun = read_growth(path, recorded)
    if extends(wanted, begun):
        return grown(recorded, begun, wanted)
    if extends(recorded, wanted) and (cache.complete or not is_more(recorded, wanted)):
        return recorded.restricted(wanted.views.num_views, wanted.targets)
    growing = (
        f" (growing to {begun.views.num_views} views by {', '.join(begun.teachers)}; "
        f"`logitcache gc {place_of(path)} --growth` gives that up)"
    )
    require_growth(begun, wanted, f"{place_of(path)}{growing if is_more(begun, recorded) else ''}")
    raise AssertionError("it neither extends the cache nor differs from it")


def require_whole_pages(path: Path, goal: Manifest, recorded: Manifest) -> None:
    """Raise RecipeError naming what is new and would not fill whole pages with the shards that a cache has."""
    for name, entry in goal.teachers.items():
        added = [target for target in entry.targets if target not in recorded.targets.get(name, ())]
        wrong = [target for target in added if not _fills_pages(entry.restricted([target]), goal)]
        if wrong:
            raise RecipeError(
                f"{place_of(path)} has shards of {goal.shard_rows} rows, which {', '.join(wrong)} of teachers.{name} "
                "would not fill whole pages with. Fix: storage: packed for these, or another cache"
            )


def _fills_pages(entry: TeacherEntry, goal: Manifest) -> bool:
    try:
        choose_shard_rows([entry], goal.num_images, goal.shard_rows)
    except RecipeError:
        return False
    return True


def _plan(cache: Cache, goal: Manifest) -> Plan:
    layout = layout_of(goal)
    checksums = {array.suffix: RecordedRows(cache.path, array) for array in cache.layout.views_arrays}.get(CHECKSUMS)
    coders = Coders(cache.path, goal, layout)
    return Plan(goal, layout, coders, unfinished(cache.path, layout), cache.num_views, checksums)


def finish(path: Path, plan: Plan) -> int:
    """Let the root describe what the cache has grown to, once that is whole; returns how many shards are not there."""
    with preparing(path):
        if plan.pending:
            refresh(path)  # what other machines have committed
        recorded = read_manifest(path)
        before = recorded.digest()
        left = plan.layout.num_shards - len(committed_shards(path, plan.layout))
        if left == 0 and is_more(plan.goal, recorded) and extends(plan.goal, recorded):
            finish_growth(path, plan.goal)
            recorded = plan.goal
        elif left == 0 and Cache(path, recorded).complete:
            note_errors(path, recorded)
        inherit(before, read_manifest(path).digest())
        forget_growth(path, recorded)
        if alone(path):
            remove_leftovers(path)
    return left


def _manifest(
    recipe: PrecomputeRecipe,
    views: Views,
    entries: dict[str, TeacherEntry],
    records: tuple[canaries.Canary, ...],
    pixels: Tensor,
    shard_rows: int,
) -> Manifest:
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
    )


def _entries(
    recipe: PrecomputeRecipe, teachers: list[Teacher], dataset: ImageDataset, examples: Mapping[str, Targets]
) -> dict[str, TeacherEntry]:
    """Say who answers and what is asked for; how it is kept is not decided yet."""
    return {
        teacher.name: _entry(recipe.teachers[teacher.name], teacher, dataset, examples[teacher.name])
        for teacher in teachers
    }


def _entry(source: TeacherSource, teacher: Teacher, dataset: ImageDataset, examples: Targets) -> TeacherEntry:
    num_classes = examples.num_classes if examples.keeps_logits else None
    by_label = source.logits is not None or any(feature.kind == "grad_cam" for feature in teacher.features.values())
    if by_label and num_classes is not None and dataset.num_classes not in (None, num_classes):
        raise MismatchError(
            f"teacher {teacher.name!r} predicts {num_classes} classes, the data set has {dataset.num_classes}.\n"
            f"  Fix: point teachers.{teacher.name}.model at a checkpoint fine-tuned on these classes, keep its "
            "features alone (logits: null, no grad_cam), or read the images without labels"
        )
    return TeacherEntry(
        model=source.model.model_dump(mode="json") if source.model else None,
        weights=weights_digest(teacher.classifier.module),
        preprocessing=teacher.classifier.preprocessing,
        precision=source.precision,
        num_classes=num_classes,
        logits=source.logits,
        features=teacher.features,
    )


def unfinished(path: Path, layout: Layout) -> list[Shard]:
    """List the shards to compute: those never committed, and those whose bytes are no longer what was committed."""
    committed = committed_by_group(path, layout)
    for shard, group, text in damaged(path, layout, committed):
        say(f"writing again: {text}")
        place_of(path).remove([group.record_file(shard)])
        committed[group.name].discard(shard)
    done = set.intersection(*committed.values())
    return [shard for shard in layout.shards() if shard not in done]
