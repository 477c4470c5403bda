"""Verify a cache: compare stored bytes with commit records, and decode rows to find invalid ones."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from logitcache.cache.format.arrays import ArrayGroup, Rows
from logitcache.cache.format.growth import is_outgrown
from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import LOGITS
from logitcache.cache.format.metadata import skeleton_problems
from logitcache.cache.format.root import read_manifest
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.snapshot import Snapshot, locate, remembered_records, require_sound_skeleton
from logitcache.errors import CacheError
from logitcache.runtime.console import track
from logitcache.store.shards import Shard, StoredShard

SHOWN = 5
LISTED = 1000
ROWS = 4096
"""Rows that are decoded at a time."""


@dataclass(frozen=True)
class Verification:
    """Counts of a verification, and every problem that it found."""

    shards: int
    bytes: int
    problems: tuple[str, ...]


class Damage(NamedTuple):
    """A damaged part of a shard: its group and the problem."""

    shard: Shard
    group: ArrayGroup
    text: str


def damaged(snapshot: Snapshot, *, fresh: bool = False) -> list[Damage]:
    """Compare the stored bytes of committed shards with their records, several files at a time.

    At a URL, sizes and remembered digests are compared; `fresh` reads every byte.
    """
    found: list[Damage] = []
    readable: list[tuple[StoredShard, ArrayGroup]] = []
    committed = snapshot.committed()
    for group in snapshot.layout.groups:
        for shard, text in snapshot.damaged_records(group).items():
            found.append(Damage(shard, group, f"{shard}: {text}"))
        for shard in sorted(committed[group.name]):
            readable += [(part, group) for part in snapshot.stored(group, shard)]
    wrong = snapshot.store.wrong([part for part, _ in readable], fresh=fresh)
    found += [Damage(part.shard, group, text) for (part, group), text in zip(readable, wrong, strict=True) if text]
    return sorted(found, key=lambda damage: damage.shard)


def require_intact(snapshot: Snapshot, groups: Sequence[ArrayGroup], shards: Sequence[Shard]) -> None:
    """Raise CacheError naming damaged shards among those that are committed in some groups.

    Downloads shards of a cache at a URL.
    """
    store = snapshot.store
    if not store.is_local:
        store.ensure(row_shards(snapshot, groups, shards))
        return
    parts = [part for shard in shards for group in groups for part in snapshot.stored(group, shard)]
    found = zip(parts, store.wrong(parts, fresh=False), strict=True)
    wrong = [(part, text) for part, text in found if text is not None]
    if wrong and is_outgrown(store, *snapshot.manifest.extent):
        # The errors of a short last shard change once images are appended to it; no reader needs them.
        errors, full = {group.errors.name for group in groups if group.errors}, snapshot.layout.shard_rows
        wrong = [one for one in wrong if one[0].array not in errors or one[0].shard.stop - one[0].shard.start == full]
    _require_none(snapshot, [text for _, text in wrong])


def _require_none(snapshot: Snapshot, lines: Sequence[str]) -> None:
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        shown = "\n  ".join(lines[:SHOWN])
        raise CacheError(f"{snapshot.store} is damaged:\n  {shown}{more}\n  {snapshot.fix}")


def row_shards(snapshot: Snapshot, groups: Sequence[ArrayGroup], shards: Sequence[Shard]) -> list[StoredShard]:
    """Return the parts of shards that hold rows, with their records."""
    arrays = [snapshot.array(array) for group in groups for array in group.rows]
    return [array.stored(shard) for shard in shards for array in arrays]


def require_committed(snapshot: Snapshot) -> None:
    """Raise CacheError unless every shard has a valid commit record."""
    damaged = [snapshot.damaged_records(group) for group in snapshot.layout.groups]
    _require_none(snapshot, [f"{shard}: {text}" for texts in damaged for shard, text in sorted(texts.items())])
    if not snapshot.complete:
        total = snapshot.layout.num_shards
        raise CacheError(
            f"{snapshot.store} is incomplete: {total - len(snapshot.shards)} of {total} shards are not committed. "
            f"{snapshot.fix}"
        )


def open_committed(path: str | Path) -> Snapshot:
    """Open a finished cache; raise CacheError if it is damaged or incomplete.

    A cache that grows meanwhile is opened again.
    """
    while True:
        store = locate(path)
        manifest = read_manifest(store)
        try:
            require_sound_skeleton(store, manifest)
            snapshot = Snapshot.as_described(store, manifest, remembered_records(store, manifest))
            require_committed(snapshot)
        except CacheError:
            if read_manifest(locate(path)) == manifest:
                raise
        else:
            return snapshot


def verify_cache(snapshot: Snapshot) -> Verification:
    """Read every stored byte again and list every problem."""
    store, layout = snapshot.store, snapshot.layout
    problems = [problem.text for problem in skeleton_problems(store, snapshot.manifest)]
    present = set(snapshot.shards).union(*(snapshot.damaged_records(group) for group in layout.groups))
    problems += _not_committed(layout, present)
    found = damaged(snapshot, fresh=True)
    problems += [damage.text for damage in found]
    problems += _not_decoded(snapshot, {(damage.group.name, damage.shard) for damage in found})
    return Verification(layout.num_shards, store.stored_bytes(), tuple(problems))


def _not_decoded(snapshot: Snapshot, damaged: Collection[tuple[str, Shard]]) -> list[str]:
    """Decode packed shards, and encodings with invalid rows; return the problems of shards that match their records."""
    problems, committed = [], snapshot.committed()
    for group in snapshot.layout.groups:
        codecs = _codecs_of_checked(snapshot, group)
        arrays = [array for array in group.arrays if array.storage == "packed" or codecs]
        shards = [shard for shard in sorted(committed[group.name]) if (group.name, shard) not in damaged]
        for shard in track(shards, f"decoding {group.name}", len(shards), "shards") if arrays else ():
            try:
                rows = {array.name: snapshot.array(array).rows(shard, keep=False) for array in arrays}
                if codecs is not None:
                    _require_answers(codecs, rows, shard)
            except CacheError as error:
                problems.append(str(error))
    return problems


def _require_answers(codecs: TargetCodecs, rows: Rows, shard: Shard) -> None:
    """Decode rows in blocks; raise CacheError for an invalid row."""
    for start in range(0, shard.stop - shard.start, ROWS):
        codecs.targets({name: values[start : start + ROWS] for name, values in rows.items()}, lambda row: shard)


def _codecs_of_checked(snapshot: Snapshot, group: ArrayGroup) -> TargetCodecs | None:
    """Return the codecs of a group's logits if its encoding has invalid rows; else None."""
    stored = snapshot.manifest.teachers[group.teacher].stored_logits if group.target == LOGITS else None
    if stored is None or stored.form.any_bits:
        return None
    manifest = snapshot.manifest.restricted(snapshot.layout.num_views, {group.teacher: [LOGITS]})
    return TargetCodecs(snapshot.store, manifest, layout_of(manifest))


def _not_committed(layout: Layout, present: set[Shard]) -> list[str]:
    missing = (shard for shard in layout.shards() if shard not in present)
    lines = [f"{shard}: not committed" for shard in itertools.islice(missing, LISTED)]
    more = layout.num_shards - len(present) - len(lines)
    return [*lines, f"and {more} more are not committed"] if more else lines
