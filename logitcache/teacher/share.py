"""Which shards this process takes, of those that are to do."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from logitcache.cache.arrays import Shard
from logitcache.cache.sharing import Claim
from logitcache.cache.snapshot import Snapshot
from logitcache.errors import RecipeError


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


class Share:
    """The shards that this process takes: each is claimed before it is computed, and let go when it is committed.

    Shards of up to `views_per_image` views that hold the same images come together: one decode serves all.
    """

    def __init__(self, snapshot: Snapshot, pending: Sequence[Shard], views_per_image: int, part: Part) -> None:
        self._snapshot, layout = snapshot, snapshot.layout
        self._claims: dict[Shard, Claim] = {}
        groups: dict[int, list[Shard]] = {}
        for shard in pending:
            number = shard.view // views_per_image * layout.shards_per_view + shard.start // layout.shard_rows
            if number % part.parts == part.number - 1:
                groups.setdefault(number, []).append(shard)
        self.groups = list(groups.values())

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
