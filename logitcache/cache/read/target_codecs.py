"""Decode rows of arrays to targets, by the encodings of a cache. Their tables are read on first use."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

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
from logitcache.targets import Targets


class TargetCodecs:
    """The encodings of every target of a cache, by the name of its group.

    `tables`, by array name, are not written to the store yet.
    """

    def __init__(self, store: Store, manifest: Manifest, layout: Layout, tables: Tables | None = None) -> None:
        self._store, self._manifest, self._layout, self._unwritten = store, manifest, layout, tables or {}

    def targets(self, rows: Rows, shard_of: Callable[[int], Shard]) -> dict[str, Targets]:
        """Decode rows [B, ...] of all arrays to targets by teacher; targets other than float32 stay compact.

        `shard_of` returns the shard of a row. Raises CacheError naming the shard of an invalid row.
        """
        return {
            name: Targets(
                NO_LOGITS if logits is None else self._logits(logits, rows, shard_of),
                {target: reader.decode(reader.tensors(rows)) for target, reader in features.items()},
            )
            for name, (logits, features) in self._readers.items()
        }

    @cached_property
    def _readers(self) -> dict[str, tuple["_Reader | None", dict[str, "_Reader"]]]:
        """Readers of logits, if any, and of features, by teacher; look-ups per batch would slow short rows."""
        readers = {}
        for name in self._manifest.teachers:
            groups = {group.target: group for group in self._layout.of(name)}
            features = {
                target: _Reader(group, _arrays(group), self.features[group.name].decode)
                for target, group in groups.items()
                if target != LOGITS
            }
            readers[name] = self._logits_reader(groups) if LOGITS in groups else None, features
        return readers

    def _logits_reader(self, groups: Mapping[str, ArrayGroup]) -> "_Reader":
        group = groups[LOGITS]
        entry = self._manifest.teachers[group.teacher]
        assert entry.num_classes is not None
        assert entry.stored_logits is not None
        form = entry.stored_logits.form
        # `kept_of` has checked that the needed feature is one array.
        needed = tuple((target, groups[target].rows[0].name) for target in form.needs)
        decode = partial(self.logits[group.name].decode, num_classes=entry.num_classes)
        return _Reader(group, _arrays(group) + needed, decode, None if form.any_bits else form.wrong_row)

    @cached_property
    def logits(self) -> dict[str, LogitsCodec]:
        """Codecs of logits, by group."""
        codecs: dict[str, LogitsCodec] = {}
        for group in self._layout.targets:
            stored = self._manifest.teachers[group.teacher].stored_logits
            if group.target == LOGITS and stored is not None:
                codecs[group.name] = stored.form.ready(self._tables(group))
        return codecs

    @cached_property
    def features(self) -> dict[str, FittedFeature]:
        """Codecs of features, by group."""
        codecs = {}
        for group in self._layout.targets:
            if group.target != LOGITS:
                entry = self._manifest.teachers[group.teacher]
                stored, kind = entry.stored_features[group.target], entry.features[group.target].kind
                codecs[group.name] = FittedFeature(stored.form, self._tables(group), kind, stored.shape)
        return codecs

    def head(self, teacher: str) -> tuple[Tensor, Tensor] | None:
        """Return weight [C, D] and bias [C] of a teacher's last layer, if the logits are stored as its input."""
        codec = self.logits.get(f"{teacher}.{LOGITS}")
        if codec is None or "weight" not in codec.tables:
            return None
        weight = torch.from_numpy(np.array(codec.tables["weight"]))
        bias = codec.tables.get("bias")
        return weight, torch.zeros(len(weight)) if bias is None else torch.from_numpy(np.array(bias))

    def _logits(self, reader: "_Reader", rows: Rows, shard_of: Callable[[int], Shard]) -> Logits:
        own = reader.tensors(rows)
        found: Logits = reader.decode(own)
        if reader.wrong_row is not None and (wrong := reader.wrong_row(own, found)) is not None:
            row, what = wrong
            raise CacheError(
                f"{self._store}/{reader.group.arrays[0].file(shard_of(row))}: a row {what}. "
                f"{fix_of_contents(fix_of_damage(self._manifest))}"
            )
        return found

    def _tables(self, group: ArrayGroup) -> Tables:
        if all(table.name in self._unwritten for table in group.tables):
            return {table.suffix: self._unwritten[table.name] for table in group.tables}
        return read_tables(self._store, group)


class _Reader(NamedTuple):
    """How a target is read: its arrays, and those that it needs, by the names that `decode` takes.

    wrong_row: finds a row that stands for nothing; None if all bits stand for something.
    """

    group: ArrayGroup
    arrays: tuple[tuple[str, str], ...]
    decode: Callable[[dict[str, Tensor]], Any]
    wrong_row: Callable[[Mapping[str, Tensor], Logits], tuple[int, str] | None] | None = None

    def tensors(self, rows: Rows) -> dict[str, Tensor]:
        """Return the rows of its arrays as tensors."""
        return {suffix: torch.from_numpy(rows[name]) for suffix, name in self.arrays}


def _arrays(group: ArrayGroup) -> tuple[tuple[str, str], ...]:
    return tuple((array.suffix, array.name) for array in group.rows)
