"""Before the first shard of a derived cache: agree with its source, then create it or prove that it is to continue."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from logitcache.cache.format.derivation import Derivation, Member
from logitcache.cache.format.layout import layout_of
from logitcache.cache.format.manifest import LOGITS, Manifest, StoredLogits, TeacherEntry
from logitcache.cache.format.manifest_diff import short
from logitcache.cache.format.metadata import read_tables, repair_skeleton
from logitcache.cache.format.samples import Samples, read_canaries, read_digests, read_labels
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.claims import alone
from logitcache.cache.write.create import create_skeleton
from logitcache.config.trust import inherit
from logitcache.errors import MismatchError, RecipeError, caught, raise_all
from logitcache.runtime.console import logger
from logitcache.stage_one.derive.derive_recipe import DerivedTeacher, DeriveRecipe
from logitcache.stage_one.derive.derived_rows import CachedSample, Origin
from logitcache.stage_one.preparation import Plan, new_plan, unfinished
from logitcache.store.base import Store
from logitcache.store.files import remove_leftovers
from logitcache.teacher.fitting import mended_tables, recorded_tables, table_files

Tables = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """A finished cache, restricted to what is needed of it, and what is made of it by teacher."""

    snapshot: Snapshot
    origins: Mapping[str, Origin]

    @classmethod
    def of(cls, recipe: DeriveRecipe, cache: Snapshot) -> "Source":
        """Take of a cache what a recipe asks for. Raises RecipeError or MismatchError where it cannot be had."""
        where, manifest = str(cache.store), cache.manifest
        views = recipe.num_views or manifest.views.num_views
        origins: dict[str, Origin] = {}

        def take(name: str, teacher: DerivedTeacher) -> None:
            origins[name] = _origin(name, teacher, where, manifest)

        found = [partial(take, name, teacher) for name, teacher in recipe.teachers.items()]
        raise_all(caught(lambda: _require_views(views, where, manifest), *found))
        needed: dict[str, set[str]] = {}
        for origin in origins.values():
            for member in origin.weights:
                encoded = [] if origin.teacher.logits is None else [LOGITS]
                needed.setdefault(member, set()).update(origin.kept, encoded)
        ordered = {name: needed[name] for name in manifest.teachers if name in needed}
        return cls(cache.of(manifest.restricted(views, ordered)), origins)

    @property
    def store(self) -> Store:
        """Where the cache lies."""
        return self.snapshot.store

    @property
    def manifest(self) -> Manifest:
        """What is needed of the cache."""
        return self.snapshot.manifest

    @property
    def reader(self) -> ShardReader:
        """Reads all of it."""
        return ShardReader(self.snapshot, views=True)

    def sample(self, name: str, num_views: int) -> CachedSample:
        """Return what a teacher's encoding is fitted to: rows of the first views, of its members' logits alone."""
        members = {member: [LOGITS] for member in self.origins[name].weights}
        reader = ShardReader(self.snapshot.of(self.manifest.restricted(num_views, members)))
        return CachedSample(reader, name, self.origins[name])

    def tables(self, name: str, target: str) -> Tables:
        """Return the tables of a target that is copied, by the names of their arrays in the new cache."""
        (member, *_) = self.origins[name].weights
        groups = [group for group in self.snapshot.layout.of(member) if group.target == target]
        found = {key: table for group in groups for key, table in read_tables(self.store, group).items()}
        return {f"{name}.{target}.{key}": table for key, table in found.items()}


def _require_views(views: int, where: str, manifest: Manifest) -> None:
    if views > manifest.views.num_views:
        raise RecipeError(f"num_views is {views}, {where} has {manifest.views.num_views}. Fix: at most these")


def _origin(name: str, teacher: DerivedTeacher, where: str, manifest: Manifest) -> Origin:
    """Raise unless the members are there, can be made one, and have what is asked for."""
    members = teacher.members or {name: 1.0}
    if unknown := sorted(members.keys() - manifest.teachers.keys()):
        raise RecipeError(
            f"teachers.{name}: {where} has no teacher {', '.join(map(repr, unknown))}, but "
            f"{', '.join(manifest.teachers)}. Fix: name these in `members`"
        )
    entries = {member: manifest.teachers[member] for member in members}
    if teacher.logits is not None:
        _require_dense(name, where, entries)
    counts = {member: entry.num_classes for member, entry in entries.items()}
    if len(set(counts.values())) > 1:
        raise MismatchError(f"teachers.{name}: the members have different numbers of classes: {counts}. Fix: others")
    if teacher.average == "probabilities" and manifest.fingerprint.multi_label:
        raise RecipeError(
            f"teachers.{name}.average: images of any number of classes have no probabilities that add up to 1. "
            "Fix: average: logits"
        )
    total = sum(members.values())
    weights = {member: weight / total for member, weight in members.items()}
    return Origin(teacher, weights, _kept(name, teacher, entries[next(iter(entries))], where))


def _require_dense(name: str, where: str, entries: Mapping[str, TeacherEntry]) -> None:
    for member, entry in entries.items():
        stored = entry.stored_logits
        if stored is None:
            raise RecipeError(f"teachers.{name}: {where} keeps no logits of {member!r}. Fix: `keep` its features")
        if "dense logits" not in stored.form.gives:
            raise RecipeError(
                f"teachers.{name}.logits: {where} keeps of {member!r} the largest logits alone "
                f"({stored.form.kind}): what the others were is lost, and an encoding or a mean of them would err by "
                "nobody knows how much. Fix: `keep: [logits]` copies them as they are; or derive from a cache that "
                "keeps all logits"
            )


def _kept(name: str, teacher: DerivedTeacher, entry: TeacherEntry, where: str) -> tuple[str, ...]:
    """Return the targets that are copied, with those that they are decoded with."""
    asked = entry.targets if teacher.keep == "all" else teacher.keep
    if unknown := sorted(set(asked) - set(entry.targets)):
        raise RecipeError(f"teachers.{name}.keep: {where} has no {unknown}, but {list(entry.targets)}. Fix: name these")
    encoded = teacher.logits is not None
    return entry.restricted([target for target in asked if not (encoded and target == LOGITS)]).targets


def prepare_derived(recipe: DeriveRecipe, source: Source, target: Path, store: Store) -> Plan:
    """Create the derived cache at `target`, or prove that the one in the store is it; returns what is to do."""
    manifest = source.manifest
    is_seen = [canary.view < manifest.views.num_views for canary in manifest.canaries]
    if not any(is_seen):
        needed = min(canary.view for canary in manifest.canaries) + 1
        raise RecipeError(
            f"num_views: none of the views that prove the pixels is among the first {manifest.views.num_views} of "
            f"{source.store}. Fix: num_views: {needed} or more"
        )
    pixels = read_canaries(source.store, manifest)[np.array(is_seen)]
    samples = Samples(read_labels(source.store, manifest), read_digests(source.store, manifest), pixels)
    asked = {name: _entry(name, source) for name in source.origins}
    canaries = tuple(canary for canary, seen in zip(manifest.canaries, is_seen, strict=True) if seen)
    # Versions are those that made the pixels and the answers; the metadata is written here.
    update = {"teachers": asked, "canaries": canaries, "versions": manifest.versions | {"zarr": zarr.__version__}}
    wanted = manifest.model_copy(update=update)
    if target == store.path:
        return _continue(store, recipe, source, wanted, samples)
    entries, tables = _fit(source, asked, manifest.views.num_views)
    rows = _shard_rows(recipe, source, entries)
    goal = wanted.model_copy(update={"teachers": fit_to_pages(entries, rows), "shard_rows": rows})
    create_skeleton(target, store, goal, samples, table_files(layout_of(goal), tables))
    inherit(source.snapshot.identity, goal.digest())
    return new_plan(store, goal)


def _entry(name: str, source: Source) -> TeacherEntry:
    """Say whose answers they are and what is asked for; how logits that are encoded anew are kept is not decided."""
    origin = source.origins[name]
    teacher, entries = origin.teacher, {member: source.manifest.teachers[member] for member in origin.weights}
    first = next(iter(entries.values()))
    several = len(entries) > 1
    derivation = Derivation(
        source=source.manifest.content_digest(),
        members={
            member: Member(
                weight=origin.weights[member],
                weights=entry.weights,
                preprocessing=entry.preprocessing,
                model=entry.model,
                logits=entry.logits,
            )
            for member, entry in entries.items()
        },
        average=teacher.average,
        temperature=teacher.temperature if several and teacher.average == "probabilities" else None,
    )
    update: dict[str, Any] = {"model": derivation.model_dump(mode="json"), "weights": derivation.digest(), "errors": {}}
    if teacher.logits is not None:
        update |= {"logits": teacher.logits, "stored_logits": None}
    if several:  # of several networks, each with its own outputs
        update |= {"classes": None}
    return first.restricted(origin.kept).model_copy(update=update)


def _fit(source: Source, entries: Mapping[str, TeacherEntry], num_views: int) -> tuple[dict[str, TeacherEntry], Tables]:
    """Return the entries with forms for what is encoded anew, and all tables by array name."""
    fitted, tables = dict(entries), Tables()
    for name, entry in entries.items():
        for target in entry.targets:
            if target not in entry.unfitted:
                tables |= source.tables(name, target)
                continue
            assert entry.logits is not None
            sample = source.sample(name, num_views)
            coder = entry.logits.fitted(sample)
            known = recorded_tables(coder.tables, num_views, sample.wanted_rows)
            stored = StoredLogits.measured(coder.form, entry.logits, **known)
            fitted[name] = entry.model_copy(update={"stored_logits": stored})
            tables |= {f"{name}.{target}.{key}": table for key, table in coder.tables.items()}
    return fitted, tables


def _shard_rows(recipe: DeriveRecipe, source: Source, entries: Mapping[str, TeacherEntry]) -> int:
    """Choose the rows of a shard as stage one does; where something is copied, they are those of the source."""
    manifest = source.manifest
    if not any(origin.kept for origin in source.origins.values()):
        return choose_shard_rows(list(entries.values()), manifest.num_images, recipe.shard_rows)
    if recipe.shard_rows not in (None, manifest.shard_rows):
        raise RecipeError(
            f"shard_rows is {recipe.shard_rows}, and what is kept comes in shards of {manifest.shard_rows} rows. "
            "Fix: leave it out"
        )
    return manifest.shard_rows


def _continue(store: Store, recipe: DeriveRecipe, source: Source, wanted: Manifest, samples: Samples) -> Plan:
    """Refuse a recipe or a source of another cache; mend what is damaged of all but the shards."""
    cache = Snapshot.read(store)
    recorded = cache.manifest
    differences = list(_differences(recorded, wanted, recipe))
    if differences:
        raise MismatchError(
            f"{store} is another cache than the recipe and {source.store} make:\n  "
            + "\n  ".join(differences)
            + "\n  Fix: give `out:` another path, or remove that cache"
        )

    def fit_again(entries: Mapping[str, TeacherEntry], num_views: int | None, num_rows: int) -> Tables:
        found: Tables = {}
        for name, entry in entries.items():
            for target in entry.unfitted:
                kept = target in source.origins[name].kept
                views = num_views or wanted.views.num_views
                found |= source.tables(name, target) if kept else _fit(source, {name: entry}, views)[1]
        return found

    tables = mended_tables(store, recorded, fit_again)
    for key in repair_skeleton(store, recorded, recorded, samples, tables):
        logger.info(f"writing again: {store}/{key}")
    if alone(store):
        remove_leftovers(store.path)
    return Plan.of(cache, unfinished(cache))


def _differences(recorded: Manifest, wanted: Manifest, recipe: DeriveRecipe) -> Iterator[str]:
    """List what is recorded otherwise, but for what stage one finds out: forms, errors, versions."""
    if recorded.fingerprint != wanted.fingerprint:
        yield "it is of other images"
    if recorded.views.num_views != wanted.views.num_views:
        yield f"num_views: it has {recorded.views.num_views}, these make {wanted.views.num_views}"
    elif recorded.views != wanted.views:
        yield "views: it has others"
    if recorded.canaries != wanted.canaries:
        yield "canaries: it has others"
    for key in ("image_shape", "row_checksums", "parameters"):
        old, new = getattr(recorded, key), getattr(wanted, key)
        if old != new:
            yield f"{key}: it has {short(old)}, these make {short(new)}"
    if recipe.shard_rows not in (None, recorded.shard_rows):
        yield f"shard_rows: it has {recorded.shard_rows}, the recipe {recipe.shard_rows}"
    if list(recorded.teachers) != list(wanted.teachers):
        yield f"teachers: it has {list(recorded.teachers)}, the recipe {list(wanted.teachers)}"
    for name in recorded.teachers.keys() & wanted.teachers.keys():
        yield from _teacher_differences(name, recorded.teachers[name], wanted.teachers[name])


def _teacher_differences(name: str, recorded: TeacherEntry, wanted: TeacherEntry) -> Iterator[str]:
    if recorded.model != wanted.model:
        yield f"teachers.{name}: it was derived from {recorded.model}, the recipe derives from {wanted.model}"
    if recorded.logits != wanted.logits:
        yield f"teachers.{name}.logits: it has {short(recorded.logits)}, the recipe {short(wanted.logits)}"
    if recorded.features != wanted.features:
        yield f"teachers.{name}.keep: it has {short(recorded.features)}, the recipe {short(wanted.features)}"
