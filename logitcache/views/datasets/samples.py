"""Samples: those of all shards as one sequence of images."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.console import track
from logitcache.errors import DataError
from logitcache.remote import REQUESTS, Entry
from logitcache.views.datasets.base import UNLABELLED, Labels
from logitcache.views.datasets.ids import PackedIds
from logitcache.views.datasets.labels import LabelTable, label_of_text
from logitcache.views.datasets.shard_files import Shard
from logitcache.views.datasets.shard_index import LABEL, ShardIndex, index_of, key_of


class Samples(NamedTuple):
    """Shards with their states, and of the images of all of them, in order, names, labels and rows of SAMPLES [n].

    `stops` [S] counts the images up to the end of each shard.
    """

    shards: Sequence[Shard]
    states: Sequence[Entry]
    stops: NDArray[np.int64]
    ids: PackedIds
    labels: Labels
    table: NDArray[np.void]

    def shard_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in which shard each image lies."""
        return np.searchsorted(self.stops, indices, side="right")

    def places(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return where in its shard each image begins, and how many bytes it has."""
        rows = self.table[list(indices)]
        return list(zip(rows["start"].tolist(), rows["size"].tolist(), strict=True))


def samples_of(shards: Sequence[Shard], labelled: bool) -> Samples:
    """Find all samples, several shards at a time.

    Raises DataError for a shard or a member that cannot be used, a sample that is there twice, labels of some only.
    """
    pool, given_up = ThreadPoolExecutor(min(REQUESTS, len(shards)), "logitcache-shards"), threading.Event()
    try:
        indexed = pool.map(lambda shard: index_of(shard, given_up), shards)
        found = list(track(indexed, "reading shards", len(shards), unit="shards"))
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)
    indexes = [index for _, index in found]
    ids = _unique_ids(shards, indexes)
    return Samples(
        shards,
        [state for state, _ in found],
        np.cumsum([len(index.names) for index in indexes]),
        PackedIds(ids),
        _labels(shards, indexes, ids) if labelled else np.full(len(ids), UNLABELLED, np.int64),
        np.concatenate([index.samples for index in indexes]),
    )


def _unique_ids(shards: Sequence[Shard], indexes: Sequence[ShardIndex]) -> list[str]:
    ids = [key_of(name) for index in indexes for name in index.names]
    if len(set(ids)) == len(ids):
        return ids
    seen: dict[str, Shard] = {}
    for shard, index in zip(shards, indexes, strict=True):
        for key in map(key_of, index.names):
            if key in seen:
                raise DataError(
                    f"sample '{key}' is in two shards, '{seen[key]}' and '{shard}'.\n"
                    "  Fix: write them again with keys of their own, or leave one of the shards out."
                )
            seen[key] = shard
    raise AssertionError("a key is there twice")


def _labels(shards: Sequence[Shard], indexes: Sequence[ShardIndex], ids: Sequence[str]) -> Labels:
    """Read the labels of samples; without any, none has one."""
    texts = [label for index in indexes for label in index.labels]
    table = LabelTable(len(texts))
    if all(text is None for text in texts):
        return table.values
    read: dict[bytes, Labels] = {}
    for number, text in enumerate(texts):
        try:
            if text is None:
                raise ValueError(f"it has no '{LABEL}', and others have. Give it one, -1 for no label")
            if text not in read:
                read[text] = label_of_text(text)
            table.put(number, read[text])
        except ValueError as cause:
            stops = np.cumsum([len(index.labels) for index in indexes])
            shard = shards[int(np.searchsorted(stops, number, side="right"))]
            raise DataError(
                f"sample '{ids[number]}' of shard '{shard}' has no usable label: {cause}.\n"
                "  Fix: correct it, or set labelled: false to use none."
            ) from cause
    return table.values
