"""Gather the rows of a batch from all ranks, for losses that compare rows with one another."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from logitcache.logits import NO_LOGITS, at_least_float32, dense_logits, mapped
from logitcache.student.distributed.ranks import Ranks
from logitcache.student.losses import Loss
from logitcache.targets import Batch, Targets

EveryRow = Callable[[Tensor], Tensor]


class _EveryRow(torch.autograd.Function):
    """All-gather rows in the order of the ranks; the gradient of a row is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks.rows_of_all(rows, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = ctx.ranks.add_up(gradients[0].clone(memory_format=torch.contiguous_format))
        return total.split(ctx.counts)[ctx.ranks.rank], None, None


class WholeBatch:
    """Gather the inputs of losses that are not a mean over rows: the rows of all ranks."""

    def __init__(self, losses: Sequence[Loss], ranks: Ranks) -> None:
        self._ranks = ranks
        self._asking = [loss for loss in losses if not loss.by_row and ranks.size > 1]
        self._taps = sorted({tap for loss in self._asking for tap in loss.taps})

    def __call__(self, outputs: Targets, batch: Batch) -> tuple[Targets, Batch]:
        """Return outputs and batch with all rows, at least float32; without images, which these losses do not use."""
        if not self._asking:
            return outputs, batch
        counts = self._ranks.gathered(len(batch))

        def every_row(rows: Tensor) -> Tensor:
            return cast(Tensor, _EveryRow.apply(rows, self._ranks, counts))

        features = {tap: every_row(at_least_float32(outputs.features[tap])) for tap in self._taps}
        student = Targets(every_row(at_least_float32(outputs.logits)), features)
        teachers = {name: self._taught(name, targets, every_row) for name, targets in batch.teachers.items()}
        images = batch.images.new_empty(sum(counts), 0)
        labels, keys = every_row(batch.labels), every_row(batch.keys)
        return student, Batch(images, labels, keys, teachers, mapped(batch.mixed, every_row))

    def _taught(self, name: str, targets: Targets, every_row: EveryRow) -> Targets:
        """Gather the targets of one teacher that the losses use: other logits may have no dense form."""
        asking = [loss for loss in self._asking if loss.teacher in (None, name)]
        features = sorted({feature for loss in asking for feature in loss.features})
        dense = any("raw logits" in loss.needs for loss in asking)
        return Targets(
            every_row(dense_logits(targets)) if dense else NO_LOGITS,
            {feature: every_row(at_least_float32(targets.features[feature])) for feature in features},
        )
