"""From rows of arrays to targets, and back: the encodings of a cache. Their tables are read when first needed."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from logitcache.cache.encodings.base import LogitsCodec, Tables
from logitcache.cache.encodings.features import FittedFeature
from logitcache.cache.format.arrays import ArrayGroup, Rows
from logitcache.cache.format.derivation import fix_of_contents, fix_of_damage
from logitcache.cache.format.layout import Layout
from logitcache.cache.format.manifest import LOGITS, Manifest
from logitcache.cache.format.metadata import read_tables
from logitcache.errors import CacheError
from logitcache.logits import NO_LOGITS, Logits
from logitcache.store.base import Store
from logitcache.store.shards import Shard
from logitcache.targets import FeatureValues, Targets


class TargetCodecs:
    """The encodings of every target of a cache, by the name of its group.

    `tables`, by array name, are those that are not written yet.
    """

    def __init__(self, store: Store, manifest: Manifest, layout: Layout, tables: Tables | None = None) -> None:
        self._store, self._manifest, self._layout, self._unwritten = store, manifest, layout, tables or {}

    def targets(self, rows: Rows, shard_of: Callable[[int], Shard]) -> dict[str, Targets]:
        """Decode rows [B, ...] of all arrays into targets by teacher; what is not float32 stays compact.

        `shard_of` returns the shard of a row. Raises CacheError that names it for a row that is wrong.
        """
        found = {}
        for name, groups in self._groups.items():
            logits: Logits = NO_LOGITS
            features: dict[str, FeatureValues] = {}
            for target, group in groups.items():
                if target == LOGITS:
                    logits = self._logits(group, rows, shard_of)
                else:
                    features[target] = self.features[group.name].decode(_tensors(group, rows))
            found[name] = Targets(logits, features)
        return found

    @cached_property
    def _groups(self) -> dict[str, dict[str, ArrayGroup]]:
        """The arrays of each target, by teacher and target."""
        return {name: {group.target: group for group in self._layout.of(name)} for name in self._manifest.teachers}

    @cached_property
    def logits(self) -> dict[str, LogitsCodec]:
        """Those of logits."""
        codecs: dict[str, LogitsCodec] = {}
        for group in self._layout.targets:
            stored = self._manifest.teachers[group.teacher].stored_logits
            if group.target == LOGITS and stored is not None:
                codecs[group.name] = stored.form.ready(self._tables(group))
        return codecs

    @cached_property
    def features(self) -> dict[str, FittedFeature]:
        """Those of features."""
        codecs = {}
        for group in self._layout.targets:
            if group.target != LOGITS:
                entry = self._manifest.teachers[group.teacher]
                stored, kind = entry.stored_features[group.target], entry.features[group.target].kind
                codecs[group.name] = FittedFeature(stored.form, self._tables(group), kind, stored.shape)
        return codecs

    def head(self, teacher: str) -> tuple[Tensor, Tensor] | None:
        """Return weight [C, D] and bias [C] of the linear layer that a teacher's logits are kept as, or None."""
        codec = self.logits.get(f"{teacher}.{LOGITS}")
        if codec is None or "weight" not in codec.tables:
            return None
        weight = torch.from_numpy(np.array(codec.tables["weight"]))
        bias = codec.tables.get("bias")
        return weight, torch.zeros(len(weight)) if bias is None else torch.from_numpy(np.array(bias))

    def _logits(self, group: ArrayGroup, rows: Rows, shard_of: Callable[[int], Shard]) -> Logits:
        entry = self._manifest.teachers[group.teacher]
        assert entry.num_classes is not None
        assert entry.stored_logits is not None
        form, groups, own = entry.stored_logits.form, self._groups[group.teacher], _tensors(group, rows)
        # A layout in which what is needed is not one array is not possible.
        needed = {target: _tensors(groups[target], rows)[""] for target in form.needs}
        found = self.logits[group.name].decode(own | needed, entry.num_classes)
        if not form.any_bits and (wrong := form.wrong_row(own, found)) is not None:
            row, what = wrong
            raise CacheError(
                f"{self._store}/{group.arrays[0].file(shard_of(row))}: a row {what}. "
                f"{fix_of_contents(fix_of_damage(self._manifest))}"
            )
        return found

    def _tables(self, group: ArrayGroup) -> Tables:
        if all(table.name in self._unwritten for table in group.tables):
            return {table.suffix: self._unwritten[table.name] for table in group.tables}
        return read_tables(self._store, group)


def _tensors(group: ArrayGroup, rows: Rows) -> dict[str, Tensor]:
    return {array.suffix: torch.from_numpy(rows[array.name]) for array in group.rows}
