"""Rows of a derived cache from those of its source: a few shards are in memory, whatever their number."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.cache.format.layout import Layout
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.row_errors import count_errors
from logitcache.cache.read.shard_reader import ShardReader
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.write.writer import Rows, empty_rows
from logitcache.errors import DataError, RecipeError
from logitcache.logits import EnsembleLogits, at_least_float32, dense_logits
from logitcache.models import Classifier
from logitcache.runtime.console import track
from logitcache.stage_one.derive.derive_recipe import DerivedTeacher
from logitcache.store.shards import Shard
from logitcache.targets import Targets
from logitcache.teacher.calibration import calibration_keys, num_calibration_rows
from logitcache.teacher.encoding import encode
from logitcache.teacher.teacher import first_not_finite

NUMBERS = 1 << 20
"""Logits of a teacher that are held decoded at a time."""


@dataclass(frozen=True)
class Origin:
    """A teacher of the new cache and what it is made of: `weights` of members, which add up to 1, in their order."""

    teacher: DerivedTeacher
    weights: Mapping[str, float]
    kept: tuple[str, ...]

    def logits(self, answers: Mapping[str, Targets]) -> Tensor:
        """Return the logits that are encoded, float32 [B, C], of the answers of all members."""
        members = [at_least_float32(dense_logits(answers[name])) for name in self.weights]
        if self.teacher.average != "probabilities":
            return sum((w * z for w, z in zip(self.weights.values(), members, strict=True)), torch.zeros(()))
        weights = members[0].new_tensor([list(self.weights.values())]).expand(len(members[0]), -1)
        temperature = self.teacher.temperature
        mean = EnsembleLogits(tuple(members), weights, members[0].shape[1])
        return mean.log_probs(temperature) * temperature


@dataclass(frozen=True)
class CachedSample:
    """What an encoding is fitted to: the answers in a cache to the views that stage one would draw."""

    reader: ShardReader
    name: str
    origin: Origin

    @property
    def classifier(self) -> Classifier:
        """Raise RecipeError: there is none."""
        raise RecipeError(
            f"teachers.{self.name}.logits: kind: head takes the weights of the teacher's last layer, which are not in "
            "a cache. Fix: where the source keeps a head, `keep: [logits]`; else another kind"
        )

    @property
    def logits(self) -> Tensor:
        """Logits, float32 [N, C] on the CPU."""
        return torch.cat(list(self._answers()))

    @property
    def images(self) -> Tensor:
        """The image that each row is a view of, int64 [N]."""
        return torch.tensor([index for shard in self._rows for index in self._rows[shard]])

    @property
    def examples(self) -> Targets:
        """Raise RecipeError, as `classifier` does: only a head asks for them."""
        raise RecipeError(f"teachers.{self.name}: a cache keeps no network to try")

    @property
    def num_rows(self) -> int:
        """Rows of the whole cache."""
        return self.reader.snapshot.manifest.num_images * self.reader.snapshot.manifest.views.num_views

    @property
    def wanted_rows(self) -> int:
        """How many rows are drawn, unless there are fewer."""
        member = next(iter(self.origin.weights))
        return num_calibration_rows(self.reader.snapshot.manifest.teachers[member].num_classes or 0)

    @cached_property
    def _rows(self) -> dict[Shard, list[int]]:
        """The indices of the rows, by shard."""
        manifest, layout = self.reader.snapshot.manifest, self.reader.layout
        spec, found = manifest.views, dict[Shard, list[int]]()
        for view, index in calibration_keys(spec.seed, manifest.num_images, spec.num_views, self.wanted_rows):
            found.setdefault(layout.shard(view, index // layout.shard_rows), []).append(index)
        return found

    def _answers(self) -> Iterator[Tensor]:
        for shard in track(self._rows, f"calibrate {self.name}", len(self._rows), "shards"):
            rows, chosen = self.reader.rows(shard), np.array(self._rows[shard]) - shard.start
            yield self.origin.logits(self.reader.targets(shard, rows, chosen))


@dataclass(frozen=True)
class Deriver:
    """Make the rows of shards of a derived cache: `origins` by teacher, read from shards of the source."""

    source: ShardReader
    goal: Manifest
    layout: Layout
    coders: TargetCodecs
    origins: Mapping[str, Origin]
    device: torch.device
    _read: dict[Shard, dict[str, NDArray[Any]]] = field(default_factory=dict)

    def rows(self, shard: Shard, missing: Collection[str], check: Callable[[], None]) -> Rows:
        """Return a shard's rows of the groups that are missing; `check` is called often, and may raise."""
        rows = empty_rows([group for group in self.layout.groups if group.name in missing], shard)
        for part in self._parts(shard):
            found = self._found(part)
            start, stop = max(shard.start, part.start), min(shard.stop, part.stop)
            here, there = slice(start - shard.start, stop - shard.start), slice(start - part.start, stop - part.start)
            self._copy(rows, found, part, here, there)
            for first in range(0, stop - start, self._batch):
                check()
                last = min(first + self._batch, stop - start)
                some = slice(there.start + first, there.start + last)
                answers = self.source.targets(part, found, some)
                self._encode(rows, answers, shard, slice(here.start + first, here.start + last))
        return rows

    def _parts(self, shard: Shard) -> Iterator[Shard]:
        """Yield the shards of the source that hold a shard's rows."""
        size = self.source.layout.shard_rows
        for number in range(shard.start // size, -(-shard.stop // size)):
            yield self.source.layout.shard(shard.view, number)

    def _found(self, part: Shard) -> dict[str, NDArray[Any]]:
        """Read a shard of the source; the last one is kept, which several shards may lie in."""
        if part not in self._read:
            self._read.clear()
            self._read[part] = self.source.rows(part)
        return self._read[part]

    @cached_property
    def _batch(self) -> int:
        """Rows that are decoded at a time."""
        return max(1, NUMBERS // max(entry.num_classes or 1 for entry in self.goal.teachers.values()))

    def _copy(self, rows: Rows, found: Mapping[str, NDArray[Any]], part: Shard, here: slice, there: slice) -> None:
        """Copy what is kept as it is, and what is recorded of the views themselves."""
        for array in self.layout.views_arrays:
            if array.name in rows:
                rows[array.name][here] = found[array.name][there]
        for name, origin in self.origins.items():
            (member, *_) = origin.weights
            theirs = {group.target: group for group in self.source.layout.of(member)}
            for group in self.layout.of(name):
                if group.target not in origin.kept or group.arrays[0].name not in rows:
                    continue
                for mine, array in zip(group.rows, theirs[group.target].rows, strict=True):
                    rows[mine.name][here] = found[array.name][there]
                errors = theirs[group.target].errors
                if group.errors is not None and errors is not None:
                    # Shards are those of the source where anything is copied.
                    rows[group.errors.name][:] = self.source.snapshot.array(errors).rows(part)

    def _encode(self, rows: Rows, answers: Mapping[str, Targets], shard: Shard, here: slice) -> None:
        """Encode a batch of answers for every teacher whose logits are kept anew."""

        def name_of(row: int) -> str:
            return f"view {shard.view} of image {shard.start + here.start + row}"

        for name, origin in self.origins.items():
            groups = [g for g in self.layout.of(name) if g.target == LOGITS and LOGITS not in origin.kept]
            if not groups or groups[0].arrays[0].name not in rows:
                continue
            (group,) = groups
            exact = origin.logits({member: answers[member].to(self.device) for member in origin.weights})
            encoded = encode(self.coders, self.goal.teachers[name], groups, Targets(exact), name_of)[LOGITS]
            for array in group.rows:
                values = encoded.arrays[array.suffix]
                row = first_not_finite(values)
                if row is not None:
                    raise DataError(
                        f"teachers.{name}: a logit of {name_of(row)} does not fit {values.dtype}. Fix: "
                        f"teachers.{name}.logits: {{kind: dense, dtype: float32}}"
                    )
                rows[array.name][here] = values.cpu().numpy()
            if group.errors is not None and encoded.errors is not None:
                count_errors(rows[group.errors.name][0], encoded.errors)
