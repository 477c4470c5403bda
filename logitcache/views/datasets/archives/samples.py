"""Samples: those of all shards as one sequence of images."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError
from logitcache.runtime.console import track
from logitcache.store.remote.client import REQUESTS, Entry
from logitcache.views.datasets.archives.shard_files import Shard
from logitcache.views.datasets.archives.shard_index import LABEL, ShardIndex, index_of, key_of
from logitcache.views.datasets.base import UNLABELLED, Labels
from logitcache.views.datasets.images.ids import PackedIds, narrowed
from logitcache.views.datasets.images.image_files import Head
from logitcache.views.datasets.images.labels import LabelTable, label_of_text

Unsigned = NDArray[np.unsignedinteger[Any]]


class Samples(NamedTuple):
    """Shards with their states, and of the images of all of them, in order, names and labels, and what `Places` holds.

    `stops` [S] counts the images up to the end of each shard.
    """

    shards: Sequence[Shard]
    states: Sequence[Entry]
    stops: NDArray[np.int64]
    ids: PackedIds
    labels: Labels
    places: "Places"

    def shard_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in which shard each image lies."""
        return np.searchsorted(self.stops, indices, side="right")


class Places(NamedTuple):
    """Of images: the first byte of each in its shard and how many there are, [n], its digest [n], its head [n, 3].

    Numbers take the narrowest type that holds them.
    """

    starts: Unsigned
    lengths: Unsigned
    digests: Unsigned
    heads: Unsigned

    def pieces(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return where in its shard each image begins, and how many bytes it has."""
        rows = list(indices)
        return list(zip(self.starts[rows].tolist(), self.lengths[rows].tolist(), strict=True))


class _Part(NamedTuple):
    """What is kept of a shard: numbers that equal names share, and of the texts of labels each different one, once."""

    state: Entry
    ids: PackedIds
    hashes: NDArray[np.int64]
    places: Places
    texts: Sequence[bytes | None]
    text_of: Unsigned


def samples_of(shards: Sequence[Shard], labelled: bool | None) -> Samples:
    """Find all samples, several shards at a time.

    Raises DataError for a shard or a member that cannot be used, a sample that is there twice, labels of some only.
    """
    pool, given_up = ThreadPoolExecutor(min(REQUESTS, len(shards)), "logitcache-shards"), threading.Event()
    try:
        found = pool.map(lambda shard: _part(*index_of(shard, given_up)), shards)
        parts = list(track(found, "reading shards", len(shards), unit="shards"))
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)
    _require_unique(shards, parts)
    stops = np.cumsum([len(part.ids) for part in parts])
    return Samples(
        shards,
        [part.state for part in parts],
        stops,
        PackedIds.joined([part.ids for part in parts]),
        np.full(stops[-1], UNLABELLED, np.int64) if labelled is False else _labels(shards, parts, bool(labelled)),
        Places(*map(np.concatenate, zip(*(part.places for part in parts), strict=True))),
    )


def _part(state: Entry, index: ShardIndex) -> _Part:
    keys, rows, texts = list(map(key_of, index.names)), index.samples, dict[bytes | None, int]()
    text_of = np.array([texts.setdefault(text, len(texts)) for text in index.labels])
    heads = np.stack([rows[name] for name in Head._fields], axis=1)
    places = Places(narrowed(rows["start"]), narrowed(rows["size"]), rows["digest"].astype(np.uint64), narrowed(heads))
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    return _Part(state, PackedIds(keys), hashes, places, list(texts), narrowed(text_of))


def _require_unique(shards: Sequence[Shard], parts: Sequence[_Part]) -> None:
    """Raise DataError for a name of two samples; only names whose numbers are equal are compared."""
    hashes = np.sort(np.concatenate([part.hashes for part in parts]))
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    seen: dict[str, Shard] = {}
    for shard, part in zip(shards, parts, strict=True) if len(twice) else ():
        for place in np.flatnonzero(np.isin(part.hashes, twice)).tolist():
            key = part.ids[place]
            if key in seen:
                raise DataError(
                    f"sample '{key}' is in two shards, '{seen[key]}' and '{shard}'.\n"
                    "  Fix: write them again with keys of their own, or leave one of the shards out."
                )
            seen[key] = shard


def _labels(shards: Sequence[Shard], parts: Sequence[_Part], required: bool) -> Labels:
    """Read the labels of samples; without any none has one, or DataError is raised if they are `required`."""
    table = LabelTable(sum(len(part.ids) for part in parts))
    if all(text is None for part in parts for text in part.texts):
        if required:
            raise DataError(
                f"no sample of '{shards[0]}' or the other shards has a label ('{LABEL}'), and the data set is "
                "labelled: true.\n  Fix: give every sample one, or set labelled: false."
            )
        return table.values
    read: dict[bytes, Labels] = {}
    number = 0
    for shard, part in zip(shards, parts, strict=True):
        for place, text_of in enumerate(part.text_of.tolist()):
            try:
                table.put(number, _label(part.texts[text_of], read))
            except ValueError as cause:
                raise DataError(
                    f"sample '{part.ids[place]}' of shard '{shard}' has no usable label: {cause}.\n"
                    "  Fix: correct it, or set labelled: false to use none."
                ) from cause
            number += 1
    return table.values


def _label(text: bytes | None, read: dict[bytes, Labels]) -> Labels:
    """Return the label that a text states; each text is read once. Raises ValueError for one that cannot be used."""
    if text is None:
        raise ValueError(f"it has no '{LABEL}', and others have. Give it one, -1 for no label")
    if text not in read:
        read[text] = label_of_text(text)
    return read[text]
