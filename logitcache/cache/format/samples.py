"""Samples: labels and digests of the images of a cache, the pixels of its canaries, and ids and sizes once it grew.

Each is one array of one uncompressed chunk, whose file holds its plain values. Appended images come last, so the files
of a grown cache begin with the values of the old one.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.growth import is_outgrown
from logitcache.cache.format.manifest import Manifest
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.views.canaries import array_digest
from logitcache.views.datasets.base import UNLABELLED, Fingerprint, Labels, label_dtype

DIGESTS, CANARIES, IDS, SIZES = "digest/c/0", "canary/c/0/0/0/0", "id/c/0", "size/c/0/0"
"""Keys of the files of samples; the key of the labels depends on their number of axes."""

MAX_NAME_BYTES = 1 << 20
"""Most bytes of the names of all classes."""


class Samples(NamedTuple):
    """Labels [N] or [N, C], digests [N], and the pixels of the canaries [K, C, H, W].

    If images were appended, also the ids of all, as `packed_ids` returns them, and sizes [N, 2].
    """

    labels: Labels
    digests: NDArray[np.uint64]
    canaries: NDArray[np.uint8]
    ids: bytes = b""
    sizes: NDArray[np.int64] | None = None

    def files(self) -> dict[str, bytes]:
        """Return the stored bytes by key."""
        files = {
            _label_key(self.labels.ndim): self.labels.astype(label_dtype(self.labels.ndim)).tobytes(),
            DIGESTS: self.digests.astype("<u8").tobytes(),
            CANARIES: self.canaries.tobytes(),
        }
        return files if self.sizes is None else files | {IDS: self.ids, SIZES: self.sizes.astype("<i8").tobytes()}

    def of(self, manifest: Manifest) -> "Samples":
        """Return the samples of the first images, those of a manifest."""
        count, appended = manifest.num_images, manifest.appended
        first = Samples(self.labels[:count], self.digests[:count], self.canaries[: len(manifest.canaries)])
        if appended is None or self.sizes is None:
            return first
        return first._replace(ids=self.ids[: appended.id_bytes], sizes=self.sizes[:count])


def packed_ids(ids: Iterable[str]) -> bytes:
    """Join ids by line breaks, as they are stored and digested for the fingerprint."""
    return "\n".join(ids).encode(errors="surrogateescape")


def recordable(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of classes; None if they are missing, not UTF-8, or too long for a manifest."""
    try:
        size = sum(len(name.encode()) for name in names or ())
    except UnicodeEncodeError:  # the name of a folder is not UTF-8
        return None
    return tuple(names) if names and size <= MAX_NAME_BYTES else None


class LabelFile(NamedTuple):
    """Key, shape ([N] or [N, C]) and dtype of the labels."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def label_file(recorded: Fingerprint) -> LabelFile:
    """Return the file of the labels for a fingerprint."""
    classes = (recorded.num_classes or 0,) if recorded.multi_label else ()
    shape = (recorded.num_images, *classes)
    return LabelFile(_label_key(len(shape)), shape, label_dtype(len(shape)))


def _label_key(ndim: int) -> str:
    return f"label/c{'/0' * ndim}"


def sample_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of each file of samples by key."""
    labels = label_file(manifest.fingerprint)
    pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
    sizes = {labels.key: labels.num_bytes, DIGESTS: 8 * manifest.num_images, CANARIES: pixels}
    if manifest.appended is None:
        return sizes
    return sizes | {IDS: manifest.appended.id_bytes, SIZES: 16 * manifest.num_images}


def labels_of(data: bytes, recorded: Fingerprint) -> Labels:
    """Parse the file of labels; raise ValueError for a label out of range."""
    file = label_file(recorded)
    labels: Labels = np.frombuffer(data, file.dtype).reshape(file.shape)
    stop = 2 if recorded.multi_label else recorded.num_classes or 0
    if labels.size and (labels.min() < UNLABELLED or labels.max() >= stop):
        row = int(((labels < UNLABELLED) | (labels >= stop)).reshape(len(labels), -1).any(axis=1).argmax())
        kind = "a number of 1, 0 and -1 for each class" if recorded.multi_label else f"one of {stop} classes, or -1"
        raise ValueError(f"the label of image {row} is {labels[row].tolist()}, not {kind}")
    return labels


def read_labels(store: Store, manifest: Manifest, digest: str | None = None) -> Labels:
    """Read the labels, int64 [N] or int8 [N, C], -1 for unlabelled; compare them with a digest, if given."""
    file = label_file(manifest.fingerprint)
    data = _read_first(store, manifest, file.key, digest)
    try:
        return labels_of(data, manifest.fingerprint).astype(file.dtype.newbyteorder("="))
    except ValueError as error:
        raise CacheError(f"{store}/{file.key}: {error}") from error


def read_digests(store: Store, manifest: Manifest, digest: str | None = None) -> NDArray[np.uint64]:
    """Read the digests of the images, [N]; compare them with a digest, if given."""
    return np.frombuffer(_read_first(store, manifest, DIGESTS, digest), "<u8").astype(np.uint64)


def read_ids(store: Store, manifest: Manifest, digest: str | None = None) -> list[str]:
    """Read the ids of a cache with appended images; compare them with a digest, if given."""
    ids = _read_first(store, manifest, IDS, digest).decode(errors="surrogateescape").split("\n")
    if len(ids) != manifest.num_images or len(set(ids)) != len(ids):
        raise CacheError(f"{store}/{IDS} does not hold {manifest.num_images} different ids")
    return ids


def read_sizes(store: Store, manifest: Manifest, digest: str | None = None) -> NDArray[np.int64]:
    """Read the sizes [N, 2] of the images of a cache with appended images."""
    return np.frombuffer(_read_first(store, manifest, SIZES, digest), "<i8").astype(np.int64).reshape(-1, 2)


def fingerprint_of_first(store: Store, manifest: Manifest, count: int) -> Fingerprint:
    """Return the fingerprint of the first `count` images of a cache with appended images."""
    recorded = manifest.fingerprint
    labels = read_labels(store, manifest, recorded.labels)
    files = {
        "ids": packed_ids(read_ids(store, manifest, recorded.ids)[:count]),
        "labels": labels[:count].astype(label_dtype(labels.ndim)).tobytes(),
        "sizes": read_sizes(store, manifest, recorded.sizes)[:count].astype("<i8").tobytes(),
        "content": read_digests(store, manifest, recorded.content)[:count].astype("<u8").tobytes(),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return recorded.model_copy(update={"num_images": count, **digests})


def require_first(store: Store, manifest: Manifest) -> None:
    """Raise CacheError unless the first images are those that the manifest records as first."""
    first = manifest.first
    if fingerprint_of_first(store, manifest, first.num_images) != first:
        raise CacheError(
            f"{store}: its first {first.num_images} images are not those that it began with by its manifest"
        )


def read_canaries(store: Store, manifest: Manifest) -> NDArray[np.uint8]:
    """Read the pixels of the canaries, [K, C, H, W]."""
    shape = (len(manifest.canaries), *manifest.image_shape)
    return np.frombuffer(bytearray(_read_first(store, manifest, CANARIES)), np.uint8).reshape(shape)


def require_canaries(store: Store, manifest: Manifest) -> None:
    """Raise CacheError unless the pixels of the canaries are those of the manifest."""
    pixels = read_canaries(store, manifest)
    canaries = enumerate(manifest.canaries)
    wrong = [number for number, canary in canaries if array_digest(pixels[number]) != canary.augmented]
    if wrong:
        which = ", ".join(map(str, wrong))
        raise CacheError(f"{store}/{CANARIES}: the pixels of canary {which} differ from the manifest's digest")


def _read_first(store: Store, manifest: Manifest, key: str, digest: str | None = None) -> bytes:
    """Read a file of samples; only its first part if the cache has grown since the manifest was read."""
    size = sample_sizes(manifest)[key]
    try:
        return read_sized(store, key, size, digest)
    except CacheError:
        if not is_outgrown(store, *manifest.extent):
            raise
    return read_sized(store, key, size, digest, is_first=True)


def read_sized(store: Store, key: str, size: int, digest: str | None = None, *, is_first: bool = False) -> bytes:
    """Read a file of a known size, and compare it with a SHA-256, if given; allocates no more than `size`.

    `is_first` reads the first bytes of a longer file.
    """
    try:
        data = store.read_first(key, size) if is_first else store.read(key, size)
    except FileNotFoundError as error:
        raise CacheError(f"{store}/{key} cannot be read: {error.strerror or 'it is missing'}") from error
    if len(data) != size:
        raise CacheError(f"{store}/{key} has {len(data)} bytes, the manifest implies {size}")
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CacheError(f"{store}/{key}: its values differ from the manifest's digest")
    return data
