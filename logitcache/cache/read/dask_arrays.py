"""Targets as Dask arrays: each chunk is a shard, which is read and decoded when the chunk is computed."""

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
    reader, entry = ShardReader(snapshot.of(manifest)), manifest.teachers[teacher]
    layout = reader.layout
    shape: tuple[Any, ...] = (entry.num_classes,) if target == LOGITS else entry.stored_features[target].shape
    shards = [layout.shard(0, number) for number in range(layout.shards_per_view)]
    chunks = ((1,) * layout.num_views, tuple(shard.stop - shard.start for shard in shards), *((n,) for n in shape))
    return da.map_blocks(
        _decoded,
        reader=reader,
        teacher=teacher,
        target=target,
        chunks=chunks,
        dtype=np.float32,
        meta=np.empty((0,) * len(chunks), np.float32),
        name=f"{teacher}.{target}-{tokenize(str(snapshot.store.path.absolute()), manifest.digest())}",
    )


def _decoded(reader: ShardReader, teacher: str, target: str, block_id: tuple[int, ...]) -> NDArray[np.float32]:
    """Return one target of the rows of a shard, [1, rows, ...]; raise CacheError if it is damaged."""
    shard = reader.layout.shard(*block_id[:2])
    targets = reader.targets(shard, reader.rows(shard), slice(None))[teacher]
    found = targets.logits if target == LOGITS else targets.features[target]
    values: NDArray[np.float32] = found.float().numpy()[None]
    return values
