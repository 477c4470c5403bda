"""Which shards this process takes, of those that are to do, and how long it waits for the others."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from logitcache.cache.format.metadata import read_manifest
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.claims import Claim
from logitcache.errors import RecipeError
from logitcache.runtime.console import logger
from logitcache.store.shards import Shard

PAUSE = 1.0
"""Seconds between two looks at the shards that are waited for."""


class Part(NamedTuple):
    """Part `number` of `parts`, counted from 1: processes that are given different ones need not talk."""

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "2/8"; raise RecipeError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.number <= part.parts:
            raise RecipeError(f"part {text!r} is none of 1/N to N/N. Fix: --part 1/8 to --part 8/8 for eight processes")
        return part


WHOLE = Part(1, 1)


class Left(NamedTuple):
    """Counts of shards that are not committed: claimed by other running processes, of other parts, and the rest."""

    held: int
    apart: int
    free: int

    def __str__(self) -> str:
        texts = ("held by other running processes", "left to other parts", "held by no process")
        return ", ".join(f"{count} {text}" for count, text in zip(self, texts, strict=True) if count)


class Share:
    """The shards that this process takes: each is claimed before it is computed, and let go when it is committed.

    Shards of up to `views_per_image` views that hold the same images come together: one decode serves all. With `wait`
    the process also waits for the shards of others.
    """

    def __init__(
        self, snapshot: Snapshot, pending: Sequence[Shard], views_per_image: int, part: Part, wait: bool = False
    ) -> None:
        self._snapshot, self._views_per_image, self._part, self._wait = snapshot, views_per_image, part, wait
        self._pending = list(pending)
        self._claims: dict[Shard, Claim] = {}
        self.groups = self.grouped(pending)

    def grouped(self, shards: Sequence[Shard]) -> list[list[Shard]]:
        """Return those of some shards that are for this process, in groups that share decodes."""
        groups: dict[int, list[Shard]] = {}
        for shard in shards:
            if self._is_mine(shard):
                groups.setdefault(self._number(shard), []).append(shard)
        return list(groups.values())

    def awaits(self, check: Callable[[], None]) -> bool:
        """Wait until a shard is free to be taken; False if nothing is to be waited for. `check` may end the wait."""
        is_said = not self._wait
        while self._wait:
            check()
            self._pending = [shard for shard in self._pending if self.missing(shard)]
            if not self._pending:
                return False
            left = self.left(self._pending)
            if left.free:
                return True
            if not is_said:
                logger.info(f"waiting for {len(self._pending)} shards of {self._snapshot.store}: {left}")
                is_said = True
            read_manifest(self._snapshot.store)  # raises if the cache is gone
            time.sleep(PAUSE)
        return False

    def left(self, shards: Sequence[Shard]) -> Left:
        """Count shards that are not committed by who has them."""
        store = self._snapshot.store
        held = {shard for shard in shards if Claim(store, shard).is_held()}
        apart = sum(not self._is_mine(shard) for shard in shards if shard not in held)
        return Left(len(held), apart, len(shards) - len(held) - apart)

    def _number(self, shard: Shard) -> int:
        layout = self._snapshot.layout
        return shard.view // self._views_per_image * layout.shards_per_view + shard.start // layout.shard_rows

    def _is_mine(self, shard: Shard) -> bool:
        return self._number(shard) % self._part.parts == self._part.number - 1

    @property
    def most_lost(self) -> int:
        """Row-views that a stop drops at most: those of the shards that are computed together."""
        return max((sum(shard.stop - shard.start for shard in group) for group in self.groups), default=0)

    def take(self) -> Iterator[list[Shard]]:
        """Yield groups of shards as they are claimed; a later call finds those that others have let go since."""
        for group in self.groups:
            claimed = [shard for shard in group if self._claim(shard)]
            if claimed:
                yield claimed

    def missing(self, shard: Shard) -> list[str]:
        """Name what is not committed of a shard: the groups of arrays that have no record of it."""
        return self._snapshot.missing(shard)

    def committed(self, shard: Shard) -> None:
        """Let go of a shard that is committed, or that is given up."""
        self._claims.pop(shard).release()

    def close(self) -> None:
        """Let go of all shards."""
        for shard in list(self._claims):
            self.committed(shard)

    def _claim(self, shard: Shard) -> bool:
        if shard in self._claims or not self.missing(shard):
            return False
        claim = Claim(self._snapshot.store, shard)
        if not claim.take():
            return False
        # Another process may have committed it before it let go.
        if not self.missing(shard):
            claim.release()
            return False
        self._claims[shard] = claim
        return True
