"""The samples of all shards as one sequence of images."""

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError
from logitcache.runtime.console import track
from logitcache.store.remote.client import REQUESTS, Entry
from logitcache.views.datasets.archives.shard_files import Shard
from logitcache.views.datasets.archives.shard_index import LABEL, Places, ShardIndex, index_of
from logitcache.views.datasets.base import UNLABELLED, Labels
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.datasets.images.labels import LabelTable, label_of_text


class ArchiveSamples(NamedTuple):
    """Shards with their states, and of the images of all of them, in order, names and labels, and what `Places` holds.

    `stops` [S] counts the images up to the end of each shard.
    """

    shards: Sequence[Shard]
    states: Sequence[Entry]
    stops: NDArray[np.int64]
    ids: PackedIds
    labels: Labels
    places: Places

    def shard_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in which shard each image lies."""
        return np.searchsorted(self.stops, indices, side="right")


def samples_of(shards: Sequence[Shard], labelled: bool | None) -> ArchiveSamples:
    """Find all samples, several shards at a time.

    Raises DataError for a shard or a member that cannot be used, a sample that is there twice, labels of some only.
    """
    pool, given_up = ThreadPoolExecutor(min(REQUESTS, len(shards)), "logitcache-shards"), threading.Event()
    try:
        found = pool.map(lambda shard: index_of(shard, given_up), shards)
        states, parts = zip(*track(found, "reading shards", len(shards), unit="shards"), strict=True)
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)
    _require_unique(shards, parts)
    stops = np.cumsum([len(part.ids) for part in parts])
    return ArchiveSamples(
        shards,
        states,
        stops,
        PackedIds.joined([part.ids for part in parts]),
        np.full(stops[-1], UNLABELLED, np.int64) if labelled is False else _labels(shards, parts, bool(labelled)),
        Places(*map(np.concatenate, zip(*(part.places for part in parts), strict=True))),
    )


def _require_unique(shards: Sequence[Shard], parts: Sequence[ShardIndex]) -> None:
    """Raise DataError for a name of two samples; only names whose numbers are equal are compared."""
    hashes = [np.fromiter(map(hash, part.ids), np.int64, len(part.ids)) for part in parts]
    ordered = np.sort(np.concatenate(hashes))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    seen: dict[str, Shard] = {}
    for shard, part, own in zip(shards, parts, hashes, strict=True) if len(twice) else ():
        for place in np.flatnonzero(np.isin(own, twice)).tolist():
            key = part.ids[place]
            if key in seen:
                raise DataError(
                    f"sample '{key}' is in two shards, '{seen[key]}' and '{shard}'.\n"
                    "  Fix: write them again with keys of their own, or leave one of the shards out."
                )
            seen[key] = shard


def _labels(shards: Sequence[Shard], parts: Sequence[ShardIndex], required: bool) -> Labels:
    """Read the labels of samples; without any none has one, or DataError is raised if they are `required`."""
    table = LabelTable(sum(len(part.ids) for part in parts))
    if all(text is None for part in parts for text in part.labels):
        if required:
            raise DataError(
                f"no sample of '{shards[0]}' or the other shards has a label ('{LABEL}'), and the data set is "
                "labelled: true.\n  Fix: give every sample one, or set labelled: false."
            )
        return table.values
    read, number = functools.cache(label_of_text), 0
    for shard, part in zip(shards, parts, strict=True):
        for place, label_of in enumerate(part.label_of.tolist()):
            text = part.labels[label_of]
            try:
                if text is None:
                    raise ValueError(f"it has no '{LABEL}', and others have. Give it one, -1 for no label")
                table.put(number, read(text))
            except ValueError as cause:
                raise DataError(
                    f"sample '{part.ids[place]}' of shard '{shard}' has no usable label: {cause}.\n"
                    "  Fix: correct it, or set labelled: false to use none."
                ) from cause
            number += 1
    return table.values
