"""Compute shards of a derived cache from those of its source: a few are in memory, whatever their number."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from logitcache.cache.format.arrays import Rows
from logitcache.cache.format.manifest import LOGITS
from logitcache.stage_one.claims import ShardGroup
from logitcache.stage_one.derive.source import SourceCache
from logitcache.stage_one.loop import RowBatch, ShardTask
from logitcache.stage_one.todo import Todo
from logitcache.store.shards import Shard
from logitcache.targets import Targets
from logitcache.teacher.encoding import fill_rows

NUMBERS = 1 << 20
"""Logits of a teacher that are held decoded at a time."""


class DeriveTask(ShardTask):
    """Compute shards of a derived cache: what is kept is copied, other logits are decoded and encoded again."""

    label = "derive"
    passes = 0

    def __init__(self, source: SourceCache, todo: Todo, device: torch.device) -> None:
        self.todo, self._source, self._device = todo, source, device
        self._reader = source.reader
        self._read: dict[Shard, dict[str, NDArray[Any]]] = {}

    def num_batches(self, shard: Shard) -> int:
        """Count the batches of a shard."""
        return sum(1 for _ in self._ranges(shard))

    def batches(self, group: ShardGroup) -> Iterator[RowBatch]:
        """Cut a shard into batches whose rows are in one shard of the source each."""
        (shard,) = group.missing
        for images in self._ranges(shard):
            yield RowBatch(group, images, images.stop == shard.stop)

    def fill(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """Fill the rows of each batch from its shard of the source."""
        for batch in batches:
            self._fill(batch)
            yield batch

    def _ranges(self, shard: Shard) -> Iterator[range]:
        size = self._reader.layout.shard_rows
        numbers = max(entry.num_classes or 1 for entry in self.todo.goal.teachers.values())
        batch = max(1, NUMBERS // numbers)
        for begin in range(shard.start // size * size, shard.stop, size):
            stop = min(begin + size, shard.stop)
            for start in range(max(begin, shard.start), stop, batch):
                yield range(start, min(start + batch, stop))

    def _fill(self, batch: RowBatch) -> None:
        ((shard, rows),) = batch.group.rows.items()
        start, stop = batch.images[0], batch.images[-1] + 1
        part = self._reader.layout.shard(shard.view, start // self._reader.layout.shard_rows)
        if part not in self._read:  # the last one is kept, which several batches and shards may lie in
            self._read.clear()
            self._read[part] = self._reader.rows(part)
        here, there = slice(start - shard.start, stop - shard.start), slice(start - part.start, stop - part.start)
        self._copy(rows, self._read[part], part, here, there)
        self._encode(rows, self._reader.targets(part, self._read[part], there), shard, here)

    def _copy(self, rows: Rows, found: Mapping[str, NDArray[Any]], part: Shard, here: slice, there: slice) -> None:
        """Copy the targets that are kept, and the records of the views themselves."""
        for array in self.todo.layout.views_arrays:
            if array.name in rows:
                rows[array.name][here] = found[array.name][there]
        for name, origin in self._source.origins.items():
            (member, *_) = origin.weights
            theirs = {group.target: group for group in self._reader.layout.of(member)}
            for group in self.todo.layout.of(name):
                if group.target not in origin.kept or group.arrays[0].name not in rows:
                    continue
                for mine, array in zip(group.rows, theirs[group.target].rows, strict=True):
                    rows[mine.name][here] = found[array.name][there]
                errors = theirs[group.target].errors
                if group.errors is not None and errors is not None and here.start == 0:
                    # Shards are those of the source if anything is copied.
                    rows[group.errors.name][:] = self._reader.snapshot.array(errors).rows(part)

    @torch.no_grad()
    def _encode(self, rows: Rows, answers: Mapping[str, Targets], shard: Shard, here: slice) -> None:
        """Encode a batch of answers for every teacher whose logits are encoded again."""

        def name_of(row: int) -> str:
            return f"view {shard.view} of image {shard.start + here.start + row}"

        for name, origin in self._source.origins.items():
            groups = [g for g in self.todo.layout.of(name) if g.target == LOGITS and LOGITS not in origin.kept]
            if not groups or groups[0].arrays[0].name not in rows:
                continue
            exact = origin.logits({member: answers[member].to(self._device) for member in origin.weights})
            entry = self.todo.goal.teachers[name]
            fill_rows(rows, here, self.todo.codecs, entry, groups, Targets(exact), name_of)
