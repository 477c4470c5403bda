"""From the keys of a batch to the rows of its shards: views are rendered, teachers answer, answers are encoded."""

import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.format.layout import CHECKSUMS
from logitcache.cache.write.unreadable_images import note_unreadable
from logitcache.cache.write.writer import Rows
from logitcache.errors import DataError, caught
from logitcache.runtime.device import to_device
from logitcache.stage_one.claims import ShardGroup
from logitcache.stage_one.inputs import Inputs
from logitcache.stage_one.loop import RowBatch, ShardTask
from logitcache.stage_one.todo import Todo
from logitcache.store.shards import Shard
from logitcache.teacher.encoding import fill_rows
from logitcache.teacher.teacher import require_answers
from logitcache.views.checksums import require_rows, row_checksums
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader


class PrecomputeTask(ShardTask):
    """Compute shards of teachers' answers; `waited` adds up the seconds spent waiting for rendered views.

    An image that cannot be read is noted in the cache, unless `notes_unreadable` is False: nothing is written then.
    """

    label = "precompute"

    def __init__(self, inputs: Inputs, todo: Todo, *, notes_unreadable: bool = True) -> None:
        self.todo, self._inputs, self._notes_unreadable = todo, inputs, notes_unreadable
        recipe = inputs.recipe
        self._answered = inputs.views.answered()
        self._loader = ViewLoader(self._answered, recipe.num_workers, recipe.start_method)
        self.waited = 0.0

    @property
    def passes(self) -> int:
        """How many images the teachers' networks have taken."""
        return self._inputs.passes

    def num_batches(self, shard: Shard) -> int:
        """Count the batches of the group that a shard is in."""
        return -(-(shard.stop - shard.start) // self._inputs.recipe.batch_size)

    def batches(self, group: ShardGroup) -> Iterator[RowBatch]:
        """Cut a group into batches of images; a teacher's batch is the same whatever is rendered with it.

        Partners in one shard come together, so that each is decoded once.
        """
        size, first = self._inputs.recipe.batch_size, next(iter(group.missing))
        pairing = self._answered.spec.pairing(len(self._answered.dataset.ids))
        indices = np.arange(first.start, first.stop)
        if pairing is not None:
            indices = indices[np.argsort(pairing.places(np.full_like(indices, first.view), indices))]
        for start in range(0, len(indices), size):
            yield RowBatch(group, indices[start : start + size].tolist(), start + size >= len(indices))

    def fill(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """Render each batch ahead, and fill its rows with what the teachers answer."""
        ours, ahead = itertools.tee(batches)
        images = self._loader.render(_flat(batch.keys) for batch in ahead)
        for batch in ours:
            began, keys = time.perf_counter(), batch.keys
            rendered = self._next(images, keys)
            self.waited += time.perf_counter() - began
            for (shard, some), pixels in zip(keys.items(), rendered.chunk(len(keys)), strict=True):
                self._fill(batch.group.rows[shard], shard, some, pixels)
            yield batch

    def close(self) -> None:
        """End the processes that render."""
        self._loader.close()

    def _next(self, images: Iterator[Tensor], keys: Mapping[Shard, list[ViewKey]]) -> Tensor:
        """Take the next batch; note images that cannot be read, which may be repaired before the run continues."""
        try:
            return next(images)
        except DataError:
            every, read = _flat(keys), self._answered.dataset.read
            named = dict.fromkeys(key.index for key in (*every, *self._answered.partners(every)))
            if self._notes_unreadable:
                note_unreadable(self.todo.store, [index for index in named if caught(functools.partial(read, index))])
            raise

    def _fill(self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], images: Tensor) -> None:
        """Fill the rows of a batch of one shard, uint8 [B, C, H, W], in the arrays that it lacks.

        Where only further teachers answer, the views must be those that the others have seen.
        """
        dataset, todo = self._inputs.views.dataset, self.todo
        indices = np.array([key.index for key in keys])
        places, ids = indices - shard.start, [dataset.ids[index] for index in indices]
        pixels = to_device(images, self._inputs.device)
        labels = to_device(torch.from_numpy(dataset.labels[indices]), self._inputs.device)
        for teacher in self._inputs.teachers:
            groups = [group for group in todo.layout.of(teacher.name) if group.arrays[0].name in rows]
            if groups:
                answers, entry = teacher(pixels, labels), todo.goal.teachers[teacher.name]
                require_answers(teacher, answers, entry, ids)
                fill_rows(rows, places, todo.codecs, entry, groups, answers, lambda row: f"image {ids[row]!r}")
        self._record_views(rows, shard, keys, places, images)

    def _record_views(
        self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], places: NDArray[np.int64], images: Tensor
    ) -> None:
        """Record checksums and parameters of the views, or compare the checksums with the recorded ones."""
        group, recorded, dataset = self.todo.layout.views, self.todo.checksums, self._inputs.views.dataset
        if group is not None and group.arrays[0].name in rows:
            for array in group.arrays:
                rows[array.name][places] = (
                    row_checksums(images)
                    if array.suffix == CHECKSUMS
                    else self._inputs.views.spec.rows(keys, self._sizes[places + shard.start], len(dataset.ids))
                )
        elif recorded is not None and shard.view < self.todo.num_recorded:
            require_rows(images, keys, recorded(keys), dataset.ids)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Heights and widths of all images, [N, 2]; a data set of files looks at every one of them each time."""
        return self._inputs.views.dataset.sizes()


def _flat(keys: Mapping[Shard, list[ViewKey]]) -> list[ViewKey]:
    return list(itertools.chain.from_iterable(keys.values()))
