"""WebDataset: samples in tar archives, on this machine or at URLs."""

import contextlib
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from logitcache.config.recipe import Count
from logitcache.errors import DataError, RemoteError
from logitcache.runtime.console import track
from logitcache.store.remote.client import REQUESTS, Entry, is_remote
from logitcache.views.datasets.archives.braces import MOST_NAMES, expanded
from logitcache.views.datasets.archives.shard_files import RemoteTarShard, TarShard, shard_at
from logitcache.views.datasets.archives.shard_index import LABEL, Places, ShardIndex, differ, shard_index_of
from logitcache.views.datasets.base import UNLABELLED, DatasetBase, Labels, digest_of
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.datasets.images.image_files import Decoder, ImageFiles, Orientation
from logitcache.views.datasets.images.labels import LabelTable, label_of_text, num_classes_of
from logitcache.views.datasets.images.pixels import Mode

_GAP = 1 << 16  # bytes between two images that are cheaper to read than to ask for apart

_SPAN = 1 << 21  # bytes that one request reads of several images


class ArchiveSamples(NamedTuple):
    """Shards with their states, and of the images of all of them, in order, names and labels, and what `Places` holds.

    `stops` [S] counts the images up to the end of each shard.
    """

    shards: Sequence[TarShard]
    states: Sequence[Entry]
    stops: NDArray[np.int64]
    ids: PackedIds
    labels: Labels
    places: Places

    def shard_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in which shard each image lies."""
        return np.searchsorted(self.stops, indices, side="right")


def samples_of(shards: Sequence[TarShard], labelled: bool | None) -> ArchiveSamples:
    """Find all samples, several shards at a time.

    Raises DataError for a shard or a member that cannot be used, a sample that is there twice, labels of some only.
    """
    pool, given_up = ThreadPoolExecutor(min(REQUESTS, len(shards)), "logitcache-shards"), threading.Event()
    try:
        found = pool.map(lambda shard: shard_index_of(shard, given_up), shards)
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


def _require_unique(shards: Sequence[TarShard], parts: Sequence[ShardIndex]) -> None:
    """Raise DataError for a name of two samples; only names whose numbers are equal are compared."""
    hashes = [np.fromiter(map(hash, part.ids), np.int64, len(part.ids)) for part in parts]
    ordered = np.sort(np.concatenate(hashes))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    seen: dict[str, TarShard] = {}
    for shard, part, own in zip(shards, parts, hashes, strict=True) if len(twice) else ():
        for place in np.flatnonzero(np.isin(own, twice)).tolist():
            key = part.ids[place]
            if key in seen:
                raise DataError(
                    f"sample '{key}' is in two shards, '{seen[key]}' and '{shard}'.\n"
                    "  Fix: write them again with keys of their own, or leave one of the shards out."
                )
            seen[key] = shard


def _labels(shards: Sequence[TarShard], parts: Sequence[ShardIndex], required: bool) -> Labels:
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


class WebDataset(DatasetBase):
    """Tar archives of samples.

    Members that share their path up to the first dot of the file name are a sample, and this path is its id: an image,
    by its extension, and a label, `.cls`: a whole number (-1: none) or, for multi-label data, a list of 1, 0 and -1
    (unknown). Either every sample has a label or none has. Other members are ignored. The order is that of `shards`
    and, within each, of the archive. Compressed archives, sparse members, links to images, two images in a sample,
    truncated or concatenated archives, and samples without an image are errors that name them.
    """

    added: ClassVar[frozenset[str]] = frozenset({"orientation"})

    kind: Literal["webdataset"] = "webdataset"
    shards: str | tuple[str, ...] = Field(
        description="Archives: a pattern or a list of patterns of paths or URLs, with braces as in `{000..146}` and "
        "`{a,b}`. http(s):// needs a server that supports range requests.",
        examples=["s3://bucket/train-{000..146}.tar"],
    )
    mode: Mode = "RGB"
    labelled: bool | None = Field(
        default=None,
        description="Whether samples have labels. By default they are read if present; `true` refuses archives without "
        "labels, `false` ignores labels.",
        examples=[True, False],
    )
    num_classes: Count | None = Field(
        default=None,
        description="Number of classes; by default one more than the largest label. Classes have no names.",
        examples=[1000],
    )
    decoder: Decoder = "pillow"
    orientation: Orientation = "ignore"

    @field_validator("shards")
    @classmethod
    def _names_shards(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = locations(value)
        if not all(names) or not names:
            raise ValueError("it names no shard")
        twice = [name for name, before in zip(sorted(names)[1:], sorted(names), strict=False) if name == before]
        if twice:
            raise ValueError(f"'{twice[0]}' is named twice")
        return value

    def risks(self) -> tuple[str, ...]:
        """Name a shard at a URL; archives here are regular files, parsed by a reader of our own."""
        return next(((f"images at '{name}'",) for name in locations(self.shards) if is_remote(name)), ())

    def open(self) -> "ShardImages":
        """Find the samples; reads each byte of shards that are new or changed. Raises DataError for what is wrong."""
        samples = samples_of([shard_at(name) for name in locations(self.shards)], self.labelled)
        return ShardImages(samples, self.mode, self.num_classes, self.orientation)


def locations(shards: str | tuple[str, ...]) -> list[str]:
    """Return the paths and URLs that patterns stand for, in order; raise ValueError for more than MOST_NAMES."""
    if len(shards) > MOST_NAMES and not isinstance(shards, str):
        raise ValueError(f"there are {len(shards)} patterns. Fix: at most {MOST_NAMES}")
    names: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        names += expanded(pattern)
        if len(names) > MOST_NAMES:
            raise ValueError(f"the patterns stand for {len(names)} names or more. Fix: at most {MOST_NAMES}")
    return names


class _Span(NamedTuple):
    """The bytes start..stop of a shard, and the samples whose images they hold."""

    shard: int
    start: int
    stop: int
    samples: list[int]


class ShardImages(ImageFiles):
    """The images of samples in order: shard by shard, and in each as they were written."""

    class_names = None

    def __init__(self, samples: ArchiveSamples, mode: Mode, num_classes: int | None, orientation: Orientation) -> None:
        self.ids, self.labels = samples.ids, samples.labels
        self.num_classes = num_classes_of(self.labels, num_classes, self.ids, "the shards")
        self._samples = samples
        super().__init__(mode, orientation)
        # Where any is remote, pieces of all of them may be read at the same time.
        self._first = next((one for one in samples.shards if isinstance(one, RemoteTarShard)), samples.shards[0])

    def contents(self, indices: Sequence[int]) -> list[bytes]:
        """Read images; what lies close together is read at once, and all of it at the same time.

        Raises DataError naming an image that has changed.
        """
        spans = _spans(self._samples, indices)
        found = {}
        for span, data in zip(spans, self._first.each(self._piece, spans), strict=True):
            for index in span.samples:
                [(start, size)] = self._samples.places.pieces([index])
                content = data[start - span.start : start - span.start + size]
                if digest_of(content) != self._samples.places.digests[index]:
                    raise self._changed(index)
                found[index] = content
        return [found[index] for index in indices]

    def head(self, index: int) -> NDArray[np.int64]:
        """Return the header of one image, [3]."""
        return np.asarray(self._samples.places.heads[index], np.int64)

    def heads(self) -> NDArray[np.int64]:
        """Return the heads of all images [n, 3]."""
        return self._samples.places.heads.astype(np.int64)

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all images [n]."""
        return self._samples.places.digests.astype(np.uint64, copy=False)

    def _piece(self, span: _Span) -> bytes:
        shard = self._samples.shards[span.shard]
        try:
            return shard.piece(span.start, span.stop)
        except OSError as cause:
            raise DataError(
                f"{self.shown(span.samples[0])} cannot be read: {cause.strerror or 'the shard is gone'}.\n"
                "  Fix: put it back; shards must not change during a run."
            ) from cause
        except RemoteError as error:
            with contextlib.suppress(RemoteError):  # the first error explains more
                if differ(shard.entry(), self._samples.states[span.shard]):
                    raise self._changed(span.samples[0]) from error
            raise

    def _changed(self, index: int) -> DataError:
        return DataError(
            f"{self.shown(index)} is not what it was when the shard was opened.\n"
            "  Fix: put the shard back, or start again; shards must not change during a run."
        )

    def shown(self, index: int) -> str:
        """Name an image by its sample and shard."""
        (shard,) = self._samples.shard_of(np.array([index])).tolist()
        return f"the image of sample '{self.ids[index]}' in shard '{self._samples.shards[shard]}'"


def _spans(samples: ArchiveSamples, indices: Sequence[int]) -> list[_Span]:
    """Join the places of images that lie close together, as long as one request should read them."""
    shards = samples.shard_of(np.array(indices)).tolist()
    spans: list[_Span] = []
    for shard, (start, size), index in sorted(zip(shards, samples.places.pieces(indices), indices, strict=True)):
        last = spans[-1] if spans and shard == spans[-1].shard else None
        if last and start <= last.stop + _GAP and start + size - last.start <= _SPAN:
            last.samples.append(index)
            spans[-1] = spans[-1]._replace(stop=max(spans[-1].stop, start + size))
        else:
            spans.append(_Span(shard, start, start + size, [index]))
    return spans
