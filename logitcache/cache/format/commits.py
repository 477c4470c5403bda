"""Commit records: which shards of a group of arrays count, and what their bytes must be."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.arrays import ArrayGroup, ArrayLayout, Staged
from logitcache.cache.format.layout import Layout
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import read_folder
from logitcache.store.shards import RECORD, RECORD_BYTES, SIZE_BYTES, Shard, record_name


@dataclass(frozen=True)
class Records:
    """The commit records of a group by the number of the shard, view * per_view + its number in the view.

    `numbers` int64 [N] ascend; `values` uint8 [N, arrays * 40]. `damaged` has what is wrong with records that commit
    nothing. Those of the first `num_shards` shards were looked for, `per_view` of each view, with the ones that were
    `staged`.
    """

    num_shards: int
    numbers: NDArray[np.int64]
    values: NDArray[np.uint8]
    damaged: Mapping[int, str]
    per_view: int | None = None
    staged: Staged | None = None

    def as_numbered(self, per_view: int, staged: Staged | None) -> "Records | None":
        """Return those of the first shards of each view, as a cache of fewer images numbers them; None if unknown."""
        own = self.per_view or per_view
        if staged != self.staged or per_view > own:
            return None
        if per_view == own:
            return self
        views, places = np.divmod(self.numbers, own)
        stay = places < per_view
        damaged = {n // own * per_view + n % own: text for n, text in self.damaged.items() if n % own < per_view}
        numbers = (views * per_view + places)[stay]
        return Records(self.num_shards // own * per_view, numbers, self.values[stay], damaged, per_view, staged)

    def of(self, number: int) -> bytes | None:
        """Return the records of a shard, one of each array; None if it is not committed."""
        place = int(np.searchsorted(self.numbers, number))
        if place == len(self.numbers) or self.numbers[place] != number:
            return None
        found: bytes = self.values[place].tobytes()
        return found


def read_records(store: Store, layout: Layout, group: ArrayGroup, known: Records | None = None) -> Records:
    """Read and parse the commit records of a group that are in the folder of a store; `known` ones are kept.

    It takes time by the records that there are, not by the shards that a manifest claims.
    """
    known = None if known is None else known.as_numbered(layout.shards_per_view, group.staged)
    known = known or Records(0, np.empty(0, np.int64), np.empty((0, RECORD_BYTES * len(group.arrays)), np.uint8), {})
    if known.num_shards >= layout.num_shards:
        return known
    size, per_view = RECORD_BYTES * len(group.arrays), layout.shards_per_view
    looked_for = range(known.num_shards, layout.num_shards)

    def number_of(name: str, is_staged: bool) -> int | None:
        match = RECORD.fullmatch(name)
        if match is None or int(match[2]) >= per_view:
            return None
        number = int(match[1]) * per_view + int(match[2])
        if number not in looked_for or layout.is_staged(layout.shard(int(match[1]), int(match[2]))) != is_staged:
            return None
        return number

    found = [*read_folder(store.path, group.commits, partial(number_of, is_staged=False), size)]
    if group.staged is not None:
        found += read_folder(store.path, group.staged_commits, partial(number_of, is_staged=True), size)
    return _joined(store, layout, group, known, sorted(found))


def reread_records(store: Store, layout: Layout, group: ArrayGroup, known: Records, shards: Iterable[Shard]) -> Records:
    """Return known records of all shards with those of some as they are now; lists nothing."""
    keys = {group.arrays[0].number_of(shard): group.record_file(shard) for shard in shards}
    stay = ~np.isin(known.numbers, [*keys])
    damaged = {number: text for number, text in known.damaged.items() if number not in keys}
    found = []
    for number, key in sorted(keys.items()):
        with suppress(FileNotFoundError, CacheError):
            found.append((number, store.read(key)))
    others = replace(known, numbers=known.numbers[stay], values=known.values[stay], damaged=damaged)
    return _joined(store, layout, group, others, found)


def _joined(
    store: Store, layout: Layout, group: ArrayGroup, known: Records, found: Sequence[tuple[int, bytes]]
) -> Records:
    """Parse the records of shards by number, ascending, and add them to the known ones."""
    size = RECORD_BYTES * len(group.arrays)
    whole = [(number, data) for number, data in found if len(data) == size]
    damaged = {number: f"it does not have {size} bytes" for number, data in found if len(data) != size}
    numbers = np.array([number for number, _ in whole], np.int64)
    values = np.frombuffer(b"".join([data for _, data in whole]), np.uint8).reshape(len(numbers), size)
    impossible = _impossible(layout, group, numbers, values)
    damaged |= dict.fromkeys(numbers[impossible].tolist(), f"it states other sizes than {group.name} can have")
    places = {number: record_name(*divmod(number, layout.shards_per_view)) for number in damaged}
    named = {
        number: f"the commit record {store}/{group.commits}/{places[number]} is damaged: {why}"
        for number, why in damaged.items()
    }
    numbers, values = numbers[~impossible], values[~impossible]
    numbers, values = np.concatenate([known.numbers, numbers]), np.concatenate([known.values, values])
    order = np.argsort(numbers)
    num_shards = max(known.num_shards, layout.num_shards)
    damaged_records = {**known.damaged, **named}
    return Records(num_shards, numbers[order], values[order], damaged_records, layout.shards_per_view, group.staged)


def are_records(layout: Layout, group: ArrayGroup, shard: Shard, data: bytes) -> bool:
    """Whether some bytes are the commit records of a shard."""
    if len(data) != RECORD_BYTES * len(group.arrays):
        return False
    number = np.array([group.arrays[0].number_of(shard)], np.int64)
    return not _impossible(layout, group, number, np.frombuffer(data, np.uint8)[None]).any()


def _impossible(
    layout: Layout, group: ArrayGroup, numbers: NDArray[np.int64], values: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Return which records [N] state sizes that no shard has; the last shard of a view may have fewer rows.

    It may also have more rows than the layout has images: those of a cache that grew since.
    """
    records = values.reshape(len(values), len(group.arrays), RECORD_BYTES)
    sizes = np.ascontiguousarray(records[:, :, :SIZE_BYTES]).view("<u8")[:, :, 0]
    is_last = numbers % layout.shards_per_view == layout.shards_per_view - 1
    full, last = layout.shard(0, 0), layout.shard(0, layout.shards_per_view - 1)
    bounds = np.array([[_bounds(array, shard) for array in group.arrays] for shard in (full, last)], np.uint64)
    bounds = bounds.reshape(2, len(group.arrays), 2)
    bounds[1, :, 1] = [_bounds(array, Shard(0, 0, layout.shard_rows))[1] for array in group.arrays]
    least, most = np.moveaxis(bounds[is_last.astype(np.intp)], 2, 0)
    found: NDArray[np.bool_] = ((sizes < least) | (sizes > most)).any(axis=1)
    return found


def _bounds(array: ArrayLayout, shard: Shard) -> tuple[int, int]:
    rows = array.rows_of(shard)
    return array.stored_bounds(rows.stop - rows.start)
