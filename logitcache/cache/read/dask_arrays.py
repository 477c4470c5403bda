"""Targets as Dask arrays: each chunk is a shard, which is read and decoded where and when it is computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from numpy.typing import NDArray

from logitcache.cache.format.manifest import LOGITS
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.snapshot import Snapshot


def as_dask(snapshot: Snapshot) -> dict[str, dict[str, da.Array]]:
    """Return every target by teacher and name, float32 [V, N, ...]; nothing is read yet."""
    return {
        teacher: {target: _array(snapshot, teacher, target) for target in targets}
        for teacher, targets in snapshot.manifest.targets.items()
    }


def _array(snapshot: Snapshot, teacher: str, target: str) -> da.Array:
    manifest = snapshot.manifest.restricted(snapshot.manifest.views.num_views, {teacher: [target]})
    reader = _TargetReader(snapshot.of(manifest), teacher, target)
    layout = reader.shards.layout
    rows = tuple(layout.shard(0, number) for number in range(layout.shards_per_view))
    chunks = ((1,) * layout.num_views, tuple(shard.stop - shard.start for shard in rows), *((n,) for n in reader.shape))
    return da.map_blocks(
        _decoded,
        reader=reader,
        chunks=chunks,
        dtype=np.float32,
        meta=np.empty((0,) * len(chunks), np.float32),
        name=f"{teacher}.{target}-{tokenize(str(snapshot.store.path.absolute()), manifest.digest())}",
    )


def _decoded(reader: "_TargetReader", block_id: tuple[int, ...]) -> NDArray[np.float32]:
    return reader(*block_id[:2])


@dataclass(frozen=True)
class _TargetReader:
    """Read one target of whole shards. It can be pickled: each process reads tables and metadata itself."""

    snapshot: Snapshot
    teacher: str
    target: str

    def __call__(self, view: int, number: int) -> NDArray[np.float32]:
        """Return the answers to the rows of a shard, [1, rows, ...]; raise CacheError if it is damaged."""
        shard = self.shards.layout.shard(view, number)
        targets = self.shards.targets(shard, self.shards.rows(shard), slice(None))[self.teacher]
        found = targets.logits if self.target == LOGITS else targets.features[self.target]
        values: NDArray[np.float32] = found.float().numpy()[None]
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return _TargetReader, (self.snapshot, self.teacher, self.target)

    @cached_property
    def shards(self) -> ShardReader:
        """The arrays of this target, and of those that it is decoded with."""
        return ShardReader(self.snapshot)

    @property
    def shape(self) -> tuple[int, ...]:
        """What a row decodes to."""
        entry = self.snapshot.manifest.teachers[self.teacher]
        if self.target != LOGITS:
            return entry.stored_features[self.target].shape
        assert entry.num_classes is not None
        return (entry.num_classes,)
