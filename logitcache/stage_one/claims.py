"""Which of the shards that are to do this process computes, and how long it waits for those of other processes."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from logitcache.cache.format.arrays import ArrayGroup, Rows
from logitcache.cache.format.root import read_manifest
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.writer import empty_rows
from logitcache.cache.write.writer_locks import Claim
from logitcache.errors import RecipeError
from logitcache.runtime.console import logger
from logitcache.store.shards import Shard

POLL = 1.0
"""Seconds between two looks at shards of other processes: their commits and claims are files, on any machine."""


Part = tuple[int, int]
"""Number and count of parts, from 1: processes with different parts share the shards without talking."""


def parse_part(text: str | None) -> Part:
    """Parse a part such as "2/8"; None is the whole. Raises RecipeError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", "1/1" if text is None else text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise RecipeError(f"part {text!r} is none of 1/N to N/N. Fix: --part 1/8 to --part 8/8 for eight processes")
    return number, count


class Left(NamedTuple):
    """Counts of shards that are not committed: claimed by other running processes, of other parts, and the rest."""

    held: int
    apart: int
    free: int

    def __str__(self) -> str:
        texts = ("held by other running processes", "left to other parts", "held by no process")
        return ", ".join(f"{count} {text}" for count, text in zip(self, texts, strict=True) if count)


@dataclass(frozen=True)
class ShardGroup:
    """Shards of the same images in one or several views, which are computed together, with the arrays each lacks."""

    missing: Mapping[Shard, Sequence[ArrayGroup]]

    @cached_property
    def rows(self) -> dict[Shard, Rows]:
        """The rows to fill; allocated at first use, as batches are planned ahead of it."""
        return {shard: empty_rows(groups, shard) for shard, groups in self.missing.items()}


class Claims:
    """Claim each shard before it is computed, and release it when it is committed.

    Shards of up to `views_per_image` views of the same images are one group: each image is decoded once for all.
    `patience` is how many seconds to wait for shards of other processes.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        shards: Sequence[Shard],
        views_per_image: int = 1,
        part: Part = (1, 1),
        patience: float = 0.0,
    ) -> None:
        self._snapshot, self._views_per_image, self._part, self._patience = snapshot, views_per_image, part, patience
        self._pending = list(shards)
        self._claims: dict[Shard, Claim] = {}
        self.groups = self.grouped(shards)

    def grouped(self, shards: Sequence[Shard]) -> list[list[Shard]]:
        """Return the shards of this process's part, by group."""
        groups: dict[int, list[Shard]] = {}
        for shard in shards:
            if self._is_mine(shard):
                groups.setdefault(self._number(shard), []).append(shard)
        return list(groups.values())

    def take(self) -> Iterator[ShardGroup]:
        """Claim and yield one group after the other; a later call finds the shards that others released since."""
        for group in self.groups:
            claimed = {shard: missing for shard in group if (missing := self._claim(shard))}
            if claimed:
                yield ShardGroup(claimed)

    def wait(self, pause: Callable[[float], None]) -> bool:
        """Wait until a shard is free; False if all are committed or the patience is at an end.

        `pause` waits some seconds, and may raise to end the wait.
        """
        deadline, is_reported = time.monotonic() + self._patience, False
        while (left := deadline - time.monotonic()) > 0:
            pause(0.0)
            self._pending = [shard for shard in self._pending if self.missing(shard)]
            counts = self.count_left(self._pending)
            if counts.free or not self._pending:
                return counts.free > 0
            if not is_reported and math.isinf(left):
                logger.info(f"waiting for {len(self._pending)} shards of {self._snapshot.store}: {counts}")
                is_reported = True
            read_manifest(self._snapshot.store)  # raises if the cache is gone
            pause(min(POLL, left))
        return False

    def count_left(self, shards: Sequence[Shard]) -> Left:
        """Count shards that are not committed by who computes them."""
        store = self._snapshot.store
        held = {shard for shard in shards if Claim(store, shard).is_held()}
        apart = sum(not self._is_mine(shard) for shard in shards if shard not in held)
        return Left(len(held), apart, len(shards) - len(held) - apart)

    @property
    def most_lost(self) -> int:
        """Row-views that a stop drops at most: those of the shards that are computed together."""
        return max((sum(shard.stop - shard.start for shard in group) for group in self.groups), default=0)

    def missing(self, shard: Shard) -> list[ArrayGroup]:
        """Return the groups of arrays in which a shard is not committed by now."""
        names = self._snapshot.missing(shard)
        return [group for group in self._snapshot.layout.groups if group.name in names]

    def release(self, shard: Shard) -> None:
        """Let go of a shard that is committed, or that is given up."""
        self._claims.pop(shard).release()

    def close(self) -> None:
        """Let go of all shards."""
        for shard in list(self._claims):
            self.release(shard)

    def _number(self, shard: Shard) -> int:
        layout = self._snapshot.layout
        return shard.view // self._views_per_image * layout.shards_per_view + shard.start // layout.shard_rows

    def _is_mine(self, shard: Shard) -> bool:
        number, count = self._part
        return self._number(shard) % count == number - 1

    def _claim(self, shard: Shard) -> list[ArrayGroup]:
        """Claim a shard and return what it lacks; nothing if it is committed, or another process has it."""
        if shard in self._claims or not self.missing(shard):
            return []
        claim = Claim(self._snapshot.store, shard)
        if not claim.take():
            return []
        # Another process may have committed it before it let go.
        missing = self.missing(shard)
        if missing:
            self._claims[shard] = claim
        else:
            claim.release()
        return missing
