"""WebDataset: samples in tar archives, on this machine or at URLs."""

import contextlib
import io
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from logitcache.config.recipe import Count
from logitcache.errors import DataError, RemoteError
from logitcache.store.remote.client import is_remote
from logitcache.views.datasets.archives.archive_samples import ArchiveSamples, samples_of
from logitcache.views.datasets.archives.shard_files import MOST_NAMES, RemoteShard, expanded, shard_at
from logitcache.views.datasets.archives.shard_index import differ
from logitcache.views.datasets.base import DatasetBase, digest_of
from logitcache.views.datasets.images.image_files import ImageFiles, Mode, Orientation
from logitcache.views.datasets.images.labels import num_classes_of

_GAP = 1 << 16  # bytes between two images that are cheaper to read than to ask for apart
_SPAN = 1 << 21  # bytes that one request reads of several images


class WebDataset(DatasetBase):
    """Tar archives of samples.

    Members that share their path up to the first dot of the file's name are a sample, and that path is its id: an
    image, by its extension, and a label, `.cls`: a whole number (-1: none) or, for any number of classes, a list of 1,
    0 and -1 (unknown). Either every sample has a label or none has. Other members are left out. The order is that of
    `shards` and, within each, of the archive. Compressed archives, sparse members, links to images, two images in a
    sample, archives that were cut or joined, and samples without an image are refused by name.
    """

    added: ClassVar[frozenset[str]] = frozenset({"orientation"})

    kind: Literal["webdataset"] = "webdataset"
    shards: str | tuple[str, ...] = Field(
        description="Archives, a pattern or a list of patterns of paths or URLs: `{000..146}` counts, `{a,b}` "
        "lists. http(s):// takes a server that answers ranges.",
        examples=["s3://bucket/train-{000..146}.tar"],
    )
    mode: Mode = Field(default="RGB", description="Channels of the pixels: `RGB`, or `L` for grey.")
    labelled: bool | None = Field(
        default=None,
        description="Whether samples have labels. By default they may; `true` refuses archives without labels, "
        "`false` ignores them.",
        examples=[True, False],
    )
    num_classes: Count | None = Field(
        default=None,
        description="Number of classes; by default one more than the largest label. Classes have no names.",
        examples=[1000],
    )
    decoder: Literal["pillow"] = Field(
        default="pillow", description="Library that turns files into pixels; the cache records it with its version."
    )
    orientation: Orientation = Field(
        default="ignore",
        description="What becomes of the EXIF orientation of cameras: `ignore` keeps pixels as they are stored, as "
        "torchvision does; `apply` rotates them. A cache stays as it was made.",
    )

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
        self._first = next((one for one in samples.shards if isinstance(one, RemoteShard)), samples.shards[0])

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises DataError naming an image that has changed or cannot be decoded."""
        return self.read_batch([index])[0]

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several images; what lies close together is read at once, and all of it at the same time."""
        spans = _spans(self._samples, indices)
        found = {}
        for span, data in zip(spans, self._first.each(self._piece, spans), strict=True):
            for index in span.samples:
                [(start, size)] = self._samples.places.pieces([index])
                content = data[start - span.start : start - span.start + size]
                if digest_of(content) != self._samples.places.digests[index]:
                    raise self._changed(span.shard, index)
                found[index] = self.decoded(io.BytesIO(content), self._shown(span.shard, index))
        return [found[index] for index in indices]

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
                f"{self._shown(span.shard, span.samples[0])} cannot be read: {cause.strerror or 'the shard is gone'}.\n"
                "  Fix: put it back; shards must not change during a run."
            ) from cause
        except RemoteError as error:
            with contextlib.suppress(RemoteError):  # the first error explains more
                if differ(shard.entry(), self._samples.states[span.shard]):
                    raise self._changed(span.shard, span.samples[0]) from error
            raise

    def _changed(self, shard: int, index: int) -> DataError:
        return DataError(
            f"{self._shown(shard, index)} is not what it was when the shard was opened.\n"
            "  Fix: put the shard back, or start again; shards must not change during a run."
        )

    def _shown(self, shard: int, index: int) -> str:
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
