"""Compare a cache's stored bytes with its commit records."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from logitcache.cache.arrays import RECORD, RECORD_BYTES, ArrayGroup, ArrayLayout, Shard, StoredShard, record_name
from logitcache.cache.copies import place_of
from logitcache.cache.derivation import fix_of_damage
from logitcache.cache.layout import Layout
from logitcache.cache.manifest import Manifest
from logitcache.cache.skeleton import skeleton_problems
from logitcache.errors import CacheError
from logitcache.files import regular_size

SHOWN = 5
LISTED = 1000


@dataclass(frozen=True)
class Verification:
    """What was compared, and everything that is wrong."""

    shards: int
    bytes: int
    problems: tuple[str, ...]


Committed = Mapping[str, AbstractSet[Shard]]
"""The shards that have a commit record, by group."""


def committed_shards(root: Path, layout: Layout) -> list[Shard]:
    """List the shards for which every group's commit record is there.

    It takes time by the records that there are, not by the shards that a manifest claims.
    """
    committed = committed_by_group(root, layout).values()
    return sorted(set.intersection(*committed)) if committed else list(layout.shards())


def committed_by_group(root: Path, layout: Layout) -> dict[str, set[Shard]]:
    """List the shards of each group for which its commit record is there."""
    return {group.name: _recorded_shards(root, layout, group) for group in layout.groups}


def _recorded_shards(root: Path, layout: Layout, group: ArrayGroup) -> set[Shard]:
    names = set(os.listdir(root / group.commits) if (root / group.commits).is_dir() else ())
    if len(names) >= layout.num_shards and names.issuperset(_record_names(layout)):
        return set(layout.shards())
    shards = set()
    for name in names:
        match = RECORD.fullmatch(name)
        if match:
            shard = layout.shard(int(match[1]), int(match[2]))
            if shard.view < layout.num_views and shard.start < layout.num_images:
                shards.add(shard)
    return shards


def _record_names(layout: Layout) -> Iterator[str]:
    """Yield what the record files of a group are called when all are there: matching many names takes longer."""
    for view in range(layout.num_views):
        for number in range(layout.shards_per_view):
            yield record_name(view, number)


def stored(root: Path, group: ArrayGroup, shard: Shard) -> list[StoredShard]:
    """Return every array's part of a shard with its record; raise CacheError where that is damaged."""
    key = group.record_file(shard)
    size = regular_size(root / key)
    if size is None and place_of(root).has(key):  # a copy had lost it
        size = regular_size(root / key)
    if size != RECORD_BYTES * len(group.arrays):
        where = f"{place_of(root)}/{key}"
        raise CacheError(f"view {shard.view} rows {shard.start}..{shard.stop}: the commit record {where} is damaged")
    records = (root / key).read_bytes()
    return [StoredShard(array, shard, array.record_in(records)) for array in group.arrays]


def bring(root: Path, array: ArrayLayout, shards: Iterable[Shard]) -> None:
    """Let the folder of a cache have shards of an array, where they come from elsewhere."""
    place = place_of(root)
    if not place.is_here:
        place.bring([_of_array(root, array, shard) for shard in shards])


def _of_array(root: Path, array: ArrayLayout, shard: Shard) -> StoredShard:
    key = array.record_file(shard)
    if not place_of(root).has(key):
        raise CacheError(f"{place_of(root)}/{key} is missing. {fix_of_damage(root)}")
    return StoredShard(array, shard, array.record_in((root / key).read_bytes()))


class Damage(NamedTuple):
    """What is wrong with a group's part of a shard."""

    shard: Shard
    group: ArrayGroup
    text: str


def damaged(root: Path, layout: Layout, committed: Committed, *, fresh: bool = False) -> list[Damage]:
    """Compare the stored bytes of committed shards with their records; several files are read at a time.

    Of a cache elsewhere sizes are compared, and digests as far as they are remembered; `fresh` reads every byte.
    """
    found: list[Damage] = []
    readable: list[tuple[StoredShard, ArrayGroup]] = []
    for group in layout.groups:
        for shard in sorted(committed[group.name]):
            try:
                readable += [(part, group) for part in stored(root, group, shard)]
            except CacheError as error:
                found.append(Damage(shard, group, str(error)))
    wrong = place_of(root).wrong([part for part, _ in readable], fresh=fresh)
    found += [Damage(part.shard, group, text) for (part, group), text in zip(readable, wrong, strict=True) if text]
    return sorted(found, key=lambda damage: damage.shard)


def require_intact(root: Path, layout: Layout, shards: Sequence[Shard]) -> None:
    """Raise CacheError naming the damaged ones of shards that are committed in every group.

    Those of a cache elsewhere are brought here by that.
    """
    place = place_of(root)
    if not place.is_here:
        place.bring(row_shards(root, layout, shards))
        return
    lines = [damage.text for damage in damaged(root, layout, {group.name: set(shards) for group in layout.groups})]
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise CacheError(f"{place} is damaged:\n  " + "\n  ".join(lines[:SHOWN]) + more + f"\n  {fix_of_damage(root)}")


def row_shards(root: Path, layout: Layout, shards: Sequence[Shard]) -> list[StoredShard]:
    """Return the parts of shards that hold rows, with their records."""
    every = (stored(root, group, shard) for shard in shards for group in layout.groups)
    return [part for parts in every for part in parts if not part.array.per_shard]


def verify_cache(root: Path, manifest: Manifest, layout: Layout) -> Verification:
    """Read every stored byte again and list everything that is wrong."""
    problems = [problem.text for problem in skeleton_problems(root, manifest)]
    committed = committed_by_group(root, layout)
    problems += _not_committed(layout, set.intersection(*committed.values()))
    problems += [damage.text for damage in damaged(root, layout, committed, fresh=True)]
    problems = [problem.replace(str(root), str(place_of(root))) for problem in problems]
    return Verification(layout.num_shards, place_of(root).stored_bytes(), tuple(problems))


def _not_committed(layout: Layout, present: set[Shard]) -> list[str]:
    missing = (shard for shard in layout.shards() if shard not in present)
    lines = [f"view {s.view} rows {s.start}..{s.stop}: not committed" for s in itertools.islice(missing, LISTED)]
    more = layout.num_shards - len(present) - len(lines)
    return [*lines, f"and {more} more are not committed"] if more else lines
