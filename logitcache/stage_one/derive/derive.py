"""Derive a cache from a finished one: logits kept in another way, or several teachers as one. No teacher, no images."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.cache.cache import open_cache
from logitcache.cache.format.derivation import Derivation, Member
from logitcache.cache.format.manifest import Manifest, TeacherEntry
from logitcache.cache.format.manifest_diff import short
from logitcache.cache.format.root import ROOT
from logitcache.cache.format.samples import (
    Samples,
    packed_ids,
    read_canaries,
    read_digests,
    read_ids,
    read_labels,
    read_sizes,
)
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.config.trust import inherit
from logitcache.errors import MismatchError, RecipeError
from logitcache.runtime.device import resolve_device
from logitcache.stage_one.claims import Claims, parse_part
from logitcache.stage_one.cluster.cluster import Cluster
from logitcache.stage_one.cluster.fill_on_cluster import TaskOpener, fill_on_cluster, open_same
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.derive.derive_task import DeriveTask
from logitcache.stage_one.derive.source import SourceCache, Tables
from logitcache.stage_one.lifecycle import PrecomputeResult, begun, result_of
from logitcache.stage_one.loop import Done, fill
from logitcache.stage_one.todo import Skeleton, Todo
from logitcache.store.base import Store
from logitcache.store.remote.client import is_remote
from logitcache.teacher.fitting import fit_logits, refit_damaged_tables

__all__ = ["DeriveRecipe", "derive"]


def derive(
    recipe: DeriveRecipe,
    *,
    part: str | None = None,
    wait: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
) -> PrecomputeResult:
    """Fill the recipe's `out` from its `cache`; continues earlier runs, and shares the work with concurrent ones.

    `part`, `wait`, `scheduler` and `workers` as for `precompute`. Raises CacheError for a source that is damaged or
    incomplete, RecipeError for what it does not have, MismatchError if `out` is another cache, Stopped after SIGTERM
    or Ctrl-C.
    """
    started, my_part, cluster = time.perf_counter(), parse_part(part), Cluster(scheduler, workers).checked()
    here, there = (one if is_remote(one) else str(Path(one).absolute()) for one in (recipe.out, recipe.cache))
    _require_apart(recipe)
    store, device, done = locate(recipe.out), resolve_device(recipe.device), Done()
    source = SourceCache.of(recipe, open_cache(recipe.cache).snapshot)
    with begun(store, lambda: find_derived_todo(recipe, source, store)) as todo:
        if todo.recorded is None:
            inherit(source.snapshot.identity, todo.goal.digest())
        claims = Claims(todo.snapshot, todo.shards, 1, my_part, math.inf if wait else 0.0)
        if todo.shards and cluster.is_here:
            fill(DeriveTask(source, todo, device), claims, done)
        elif todo.shards:
            absolute = recipe.model_copy(update={"out": here, "cache": there})
            opener = functools.partial(open_derive_task, absolute, source.snapshot.manifest, todo.goal)
            fill_on_cluster(cluster, TaskOpener(DeriveTask.label, absolute, opener), device, todo, claims, done)
    return result_of(todo, claims, done, started)


def _require_apart(recipe: DeriveRecipe) -> None:
    """Raise RecipeError if one of both caches is, or lies in, the other."""
    here, there = (one if is_remote(one) else os.path.realpath(one) for one in (recipe.out, recipe.cache))
    if f"{here}/".startswith(f"{there}/") or f"{there}/".startswith(f"{here}/"):
        raise RecipeError(
            f"out is {recipe.out}, cache {recipe.cache}: a cache is not changed by deriving from it. Fix: another path"
        )


@contextlib.contextmanager
def open_derive_task(recipe: DeriveRecipe, source_manifest: Manifest, goal: Manifest) -> Iterator[DeriveTask]:
    """Open, in a worker, the source as the client saw it, and the cache to fill."""
    source = SourceCache.of(recipe, open_same(recipe.cache, source_manifest))
    yield DeriveTask(source, Todo(open_same(recipe.out, goal)), resolve_device(recipe.device))


def find_derived_todo(recipe: DeriveRecipe, source: SourceCache, store: Store) -> Todo:
    """Describe the derived cache, or compare the existing one with the recipe and the source; writes nothing."""
    manifest = source.snapshot.manifest
    is_seen = [canary.view < manifest.views.num_views for canary in manifest.canaries]
    if not any(is_seen):
        needed = min(canary.view for canary in manifest.canaries) + 1
        raise RecipeError(
            f"num_views: none of the views that prove the pixels is among the first {manifest.views.num_views} of "
            f"{source.snapshot.store}. Fix: num_views: {needed} or more"
        )
    pixels = read_canaries(source.snapshot.store, manifest)[np.array(is_seen)]
    samples = Samples(
        read_labels(source.snapshot.store, manifest), read_digests(source.snapshot.store, manifest), pixels
    )
    if manifest.appended is not None:
        ids = packed_ids(read_ids(source.snapshot.store, manifest))
        samples = samples._replace(ids=ids, sizes=read_sizes(source.snapshot.store, manifest))
    asked = {name: _entry(name, source) for name in source.origins}
    canaries = tuple(canary for canary, seen in zip(manifest.canaries, is_seen, strict=True) if seen)
    # Versions are those that made the pixels and the answers; the metadata is written here.
    update = {"teachers": asked, "canaries": canaries, "versions": manifest.versions | {"zarr": version("zarr")}}
    wanted = manifest.model_copy(update=update)
    if (store.path / ROOT).exists():
        return _existing(Snapshot.read(store), recipe, source, wanted, samples)
    entries, tables = _fit(source, asked, manifest.views.num_views)
    rows = _shard_rows(recipe, source, entries)
    goal = wanted.model_copy(update={"teachers": fit_to_pages(entries, rows), "shard_rows": rows})
    return Todo.compare(Snapshot.as_described(store, goal), None, Skeleton(goal, samples, {}), tables=tables)


def _existing(cache: Snapshot, recipe: DeriveRecipe, source: SourceCache, wanted: Manifest, samples: Samples) -> Todo:
    recorded = cache.manifest
    differences = _differences(recorded, wanted, recipe)
    if differences:
        raise MismatchError(
            f"{cache.store} is another cache than the recipe and {source.snapshot.store} make:\n  "
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

    repairs = refit_damaged_tables(cache.store, recorded, fit_again)
    return Todo.compare(cache, recorded, Skeleton(recorded, samples, repairs))


def _entry(name: str, source: SourceCache) -> TeacherEntry:
    """Say whose answers they are and what is asked for; how logits that are encoded anew are kept is not decided."""
    origin = source.origins[name]
    teacher, entries = origin.teacher, {member: source.snapshot.manifest.teachers[member] for member in origin.weights}
    first = next(iter(entries.values()))
    several = len(entries) > 1
    derivation = Derivation(
        source=source.snapshot.manifest.content_digest(),
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


def _fit(
    source: SourceCache, entries: Mapping[str, TeacherEntry], num_views: int
) -> tuple[dict[str, TeacherEntry], Tables]:
    """Return the entries with forms for the logits that are encoded again, and all tables by array name."""
    fitted, tables = dict(entries), Tables()
    for name, entry in entries.items():
        for target in entry.targets:
            if target in entry.unfitted:
                sample = source.sample(name, num_views)
                stored, found = fit_logits(entry, sample, num_views, sample.wanted_rows)
                fitted[name] = entry.model_copy(update={"stored_logits": stored})
                tables |= {f"{name}.{target}.{key}": table for key, table in found.items()}
            else:
                tables |= source.tables(name, target)
    return fitted, tables


def _shard_rows(recipe: DeriveRecipe, source: SourceCache, entries: Mapping[str, TeacherEntry]) -> int:
    """Choose the rows of a shard as precompute does; if something is copied, they are those of the source."""
    manifest = source.snapshot.manifest
    if not any(origin.kept for origin in source.origins.values()):
        return choose_shard_rows(list(entries.values()), manifest.num_images, recipe.shard_rows)
    if recipe.shard_rows not in (None, manifest.shard_rows):
        raise RecipeError(
            f"shard_rows is {recipe.shard_rows}, and what is kept comes in shards of {manifest.shard_rows} rows. "
            "Fix: leave it out"
        )
    return manifest.shard_rows


def _differences(recorded: Manifest, wanted: Manifest, recipe: DeriveRecipe) -> list[str]:
    """List the differences but for what a run finds out: forms, errors, versions."""
    old, new = recorded.views, wanted.views
    made: list[tuple[str, object, object]] = [
        ("num_views", old.num_views, new.num_views),
        ("views", old.model_copy(update={"num_views": new.num_views}), new),
        *(
            (key, getattr(recorded, key), getattr(wanted, key))
            for key in ("image_shape", "row_checksums", "parameters")
        ),
    ]
    named: list[tuple[str, object, object]] = [
        ("shard_rows", recorded.shard_rows, recipe.shard_rows or recorded.shard_rows),
        ("teachers", list(recorded.teachers), list(wanted.teachers)),
    ]
    lines = ["it is of other images"] if recorded.fingerprint != wanted.fingerprint else []
    lines += ["canaries: it has others"] if recorded.canaries != wanted.canaries else []
    for name in recorded.teachers.keys() & wanted.teachers.keys():
        entry, asked = recorded.teachers[name], wanted.teachers[name]
        named.append((f"teachers.{name}.logits", entry.logits, asked.logits))
        named.append((f"teachers.{name}.keep", entry.features, asked.features))
        if entry.model != asked.model:
            lines.append(f"teachers.{name}: it was derived from {entry.model}, the recipe derives from {asked.model}")
    lines += [f"{key}: it has {short(a)}, these make {short(b)}" for key, a, b in made if a != b]
    return lines + [f"{key}: it has {short(a)}, the recipe {short(b)}" for key, a, b in named if a != b]
