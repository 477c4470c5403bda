"""From the pixels of a batch to the rows of its shard: the teachers answer, and all that is kept goes to its places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.format.arrays import ArrayGroup
from logitcache.cache.format.layout import CHECKSUMS
from logitcache.cache.format.row_errors import count_errors
from logitcache.cache.write.writer import Rows
from logitcache.runtime.device import to_device
from logitcache.stage_one.preparation import Plan
from logitcache.store.shards import Shard
from logitcache.teacher.encoding import Encoded, encode
from logitcache.teacher.teacher import Teacher, require_answers, require_fits
from logitcache.views.checksums import require_rows, row_checksums
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views


@dataclass(frozen=True)
class Keeper:
    """The teachers, what is asked of them, and what is kept of the views themselves."""

    views: Views
    teachers: Sequence[Teacher]
    plan: Plan

    def keep(self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], images: Tensor) -> None:
        """Let the teachers answer a batch of one shard, uint8 [B, C, H, W], and put what `rows` has room for there.

        Where only further teachers are to answer, the views must be those that the others have seen.
        """
        places = np.array([key.index for key in keys]) - shard.start
        ids = [self.views.dataset.ids[key.index] for key in keys]
        device = self.teachers[0].device
        pixels = to_device(images, device)
        labels = to_device(torch.from_numpy(self.views.dataset.labels[places + shard.start]), device)
        for teacher in self.teachers:
            groups = [group for group in self.plan.layout.of(teacher.name) if group.arrays[0].name in rows]
            if groups:
                answers, entry = teacher(pixels, labels), self.plan.goal.teachers[teacher.name]
                require_answers(teacher, answers, entry, ids)
                encoded = encode(self.plan.coders, entry, groups, answers, lambda row: f"image {ids[row]!r}")
                _keep_answers(rows, teacher, groups, encoded, ids, places)
        self._keep_views(rows, shard, keys, places, images)

    def _keep_views(
        self, rows: Rows, shard: Shard, keys: Sequence[ViewKey], places: NDArray[np.int64], images: Tensor
    ) -> None:
        """Record what is asked for of the views, or compare them with what is recorded."""
        group, recorded = self.plan.layout.views, self.plan.checksums
        if group is not None and group.arrays[0].name in rows:
            for array in group.arrays:
                found = row_checksums(images) if array.suffix == CHECKSUMS else self._parameters(keys)
                rows[array.name][places] = found
        elif group is not None and recorded is not None and shard.view < self.plan.num_recorded:
            require_rows(images, keys, recorded(keys), self.views.dataset.ids)

    def _parameters(self, keys: Sequence[ViewKey]) -> NDArray[np.int64]:
        sizes = self._sizes[[key.index for key in keys]]
        return self.views.spec.rows(keys, sizes, len(self.views.dataset.ids))

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Heights and widths of all images, [N, 2]; a data set of files looks at every one of them each time."""
        return self.views.dataset.sizes()


def _keep_answers(
    rows: Rows,
    teacher: Teacher,
    groups: Sequence[ArrayGroup],
    encoded: Mapping[str, Encoded],
    ids: Sequence[str],
    places: NDArray[np.int64],
) -> None:
    """Copy what encodings made of a batch to its places in the shard."""
    for target, (arrays, _) in encoded.items():
        require_fits(teacher, target, arrays, ids)
    for group in groups:
        arrays, errors = encoded[group.target]
        for array in group.rows:
            rows[array.name][places] = arrays[array.suffix].cpu().numpy()
        if group.errors is not None and errors is not None:
            count_errors(rows[group.errors.name][0], errors)
