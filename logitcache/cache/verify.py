"""Compare a cache's stored bytes with its commit records."""

import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from logitcache.cache.arrays import RECORD_BYTES, ArrayGroup, ArrayLayout, Shard, seal
from logitcache.cache.layout import Layout
from logitcache.cache.manifest import Manifest
from logitcache.cache.skeleton import skeleton_problems
from logitcache.errors import CacheError
from logitcache.files import file_digests

SHOWN = 5
LISTED = 1000
_RECORD = re.compile(r"c\.(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})\.0\.0")


class StoredShard(NamedTuple):
    """One array's bytes of one shard, and the record that commits them."""

    array: ArrayLayout
    shard: Shard
    record: bytes

    @property
    def size(self) -> int:
        """Stored bytes according to the record."""
        return int(np.frombuffer(self.record[:8], "<u8")[0])

    @property
    def name(self) -> str:
        """Return what a message calls it."""
        return f"{self.array.name} view {self.shard.view} rows {self.shard.start}..{self.shard.stop}"


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
        match = _RECORD.fullmatch(name)
        if match:
            shard = layout.shard(int(match[1]), int(match[2]))
            if shard.view < layout.num_views and shard.start < layout.num_images:
                shards.add(shard)
    return shards


def _record_names(layout: Layout) -> Iterator[str]:
    """Yield what the record files of a group are called when all are there: matching many names takes longer."""
    for view in range(layout.num_views):
        for number in range(layout.shards_per_view):
            yield f"c.{view}.{number}.0.0"


def _stored(root: Path, group: ArrayGroup, shard: Shard) -> list[StoredShard]:
    """Return every array's part of a shard with its record; raise CacheError where that is damaged."""
    file = root / group.record_file(shard)
    if _size(file) != RECORD_BYTES * len(group.arrays):
        raise CacheError(f"view {shard.view} rows {shard.start}..{shard.stop}: the commit record {file} is damaged")
    records = file.read_bytes()
    return [
        StoredShard(array, shard, records[number * RECORD_BYTES : (number + 1) * RECORD_BYTES])
        for number, array in enumerate(group.arrays)
    ]


class Damage(NamedTuple):
    """What is wrong with a group's part of a shard."""

    shard: Shard
    group: ArrayGroup
    text: str


def damaged(root: Path, layout: Layout, committed: Committed, *, fresh: bool = False) -> list[Damage]:
    """Compare the stored bytes of committed shards with their records; several files are read at a time."""
    found: list[Damage] = []
    readable: list[tuple[StoredShard, ArrayGroup]] = []
    for group in layout.groups:
        for shard in sorted(committed[group.name]):
            try:
                parts = _stored(root, group, shard)
            except CacheError as error:
                found.append(Damage(shard, group, str(error)))
                continue
            for part in parts:
                wrong = _wrong_size(root, part)
                if wrong is None:
                    readable.append((part, group))
                else:
                    found.append(Damage(shard, group, wrong))
    files = [root / part.array.file(part.shard) for part, _ in readable]
    digests = file_digests(files, what="shard", fresh=fresh, error=CacheError)
    for (part, group), file, digest in zip(readable, files, digests, strict=True):
        if seal(digest, part.array.file(part.shard)) != part.record[8:]:
            found.append(Damage(part.shard, group, f"{part.name}: its bytes differ from its record ({file})"))
    return sorted(found, key=lambda damage: damage.shard)


def _wrong_size(root: Path, part: StoredShard) -> str | None:
    file = root / part.array.file(part.shard)
    size = _size(file)
    if size == part.size:
        return None
    here = "no regular file" if size is None else f"{size} bytes"
    return f"{part.name}: {here} where its record says {part.size} bytes ({file})"


def _size(file: Path) -> int | None:
    """Return the size of a regular file; None for anything else, links included."""
    try:
        status = file.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def require_intact(root: Path, layout: Layout, shards: Sequence[Shard]) -> None:
    """Raise CacheError naming the damaged ones of shards that are committed in every group."""
    lines = [damage.text for damage in damaged(root, layout, {group.name: set(shards) for group in layout.groups})]
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise CacheError(
            f"{root} is damaged:\n  "
            + "\n  ".join(lines[:SHOWN])
            + more
            + "\n  Fix: run the same `logitcache precompute` command again, it rewrites just these shards"
        )


def verify_cache(root: Path, manifest: Manifest, layout: Layout) -> Verification:
    """Read every stored byte again and list everything that is wrong."""
    problems = [problem.text for problem in skeleton_problems(root, manifest)]
    committed = committed_by_group(root, layout)
    problems += _not_committed(layout, set.intersection(*committed.values()))
    problems += [damage.text for damage in damaged(root, layout, committed, fresh=True)]
    return Verification(layout.num_shards, stored_bytes(root), tuple(problems))


def _not_committed(layout: Layout, present: set[Shard]) -> list[str]:
    missing = (shard for shard in layout.shards() if shard not in present)
    lines = [f"view {s.view} rows {s.start}..{s.stop}: not committed" for s in itertools.islice(missing, LISTED)]
    more = layout.num_shards - len(present) - len(lines)
    return [*lines, f"and {more} more are not committed"] if more else lines


def stored_bytes(root: Path) -> int:
    """Add up the sizes of a cache's files, which others may write meanwhile."""
    return sum(_size(file) or 0 for file in root.rglob("*"))
