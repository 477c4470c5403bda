"""Samples: the labels and digests of the images of a cache, and the pixels of its canaries, as stage one saw them.

Each is one array of one uncompressed chunk, whose file is its values.
"""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.format.manifest import Manifest
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.views.canaries import pixel_digest
from logitcache.views.datasets.base import UNLABELLED, Fingerprint, Labels, label_dtype

DIGESTS, CANARIES = "digest/c/0", "canary/c/0/0/0/0"
"""Keys of the digests and the canaries; that of the labels depends on their axes."""


class Samples(NamedTuple):
    """Labels [N] or [N, C], digests [N], and the pixels of the canaries [K, C, H, W]."""

    labels: Labels
    digests: NDArray[np.uint64]
    canaries: NDArray[np.uint8]

    def files(self) -> dict[str, bytes]:
        """Return the stored bytes by key."""
        return {
            _label_key(self.labels.ndim): self.labels.astype(label_dtype(self.labels.ndim)).tobytes(),
            DIGESTS: self.digests.astype("<u8").tobytes(),
            CANARIES: self.canaries.tobytes(),
        }


class LabelFile(NamedTuple):
    """The key of the labels, with their shape, [N] or [N, C], and type."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def label_file(recorded: Fingerprint) -> LabelFile:
    """Return the file of the labels of the images of a fingerprint."""
    classes = (recorded.num_classes or 0,) if recorded.multi_label else ()
    shape = (recorded.num_images, *classes)
    return LabelFile(_label_key(len(shape)), shape, label_dtype(len(shape)))


def _label_key(ndim: int) -> str:
    return f"label/c{'/0' * ndim}"


def sample_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of each file of samples by key."""
    labels = label_file(manifest.fingerprint)
    pixels = math.prod((len(manifest.canaries), *manifest.image_shape))
    return {labels.key: labels.num_bytes, DIGESTS: 8 * manifest.num_images, CANARIES: pixels}


def labels_of(data: bytes, recorded: Fingerprint) -> Labels:
    """Return the labels in the bytes of their file; raise ValueError for one that the images cannot have."""
    file = label_file(recorded)
    labels: Labels = np.frombuffer(data, file.dtype).reshape(file.shape)
    stop = 2 if recorded.multi_label else recorded.num_classes or 0
    if labels.size and (labels.min() < UNLABELLED or labels.max() >= stop):
        row = int(((labels < UNLABELLED) | (labels >= stop)).reshape(len(labels), -1).any(axis=1).argmax())
        kind = "a number of 1, 0 and -1 for each class" if recorded.multi_label else f"one of {stop} classes, or -1"
        raise ValueError(f"the label of image {row} is {labels[row].tolist()}, not {kind}")
    return labels


def read_labels(store: Store, manifest: Manifest, digest: str | None = None) -> Labels:
    """Read the labels, int64 [N] or int8 [N, C], -1 if there is none; compare them with a digest, if given."""
    file = label_file(manifest.fingerprint)
    data = read_sized(store, file.key, file.num_bytes, digest)
    try:
        return labels_of(data, manifest.fingerprint).astype(file.dtype.newbyteorder("="))
    except ValueError as error:
        raise CacheError(f"{store}/{file.key}: {error}") from error


def read_digests(store: Store, manifest: Manifest, digest: str | None = None) -> NDArray[np.uint64]:
    """Read the digests of the images, [N]; compare them with a digest, if given."""
    return np.frombuffer(read_sized(store, DIGESTS, 8 * manifest.num_images, digest), "<u8").astype(np.uint64)


def read_canaries(store: Store, manifest: Manifest) -> NDArray[np.uint8]:
    """Read the pixels of the canaries, [K, C, H, W]."""
    shape = (len(manifest.canaries), *manifest.image_shape)
    return np.frombuffer(bytearray(read_sized(store, CANARIES, math.prod(shape))), np.uint8).reshape(shape)


def require_canaries(store: Store, manifest: Manifest) -> None:
    """Raise CacheError unless the pixels of the canaries are those of the manifest."""
    pixels = read_canaries(store, manifest)
    canaries = enumerate(manifest.canaries)
    wrong = [number for number, canary in canaries if pixel_digest(pixels[number]) != canary.augmented]
    if wrong:
        which = ", ".join(map(str, wrong))
        raise CacheError(f"{store}/{CANARIES}: the pixels of canary {which} differ from the manifest's digest")


def read_sized(store: Store, key: str, size: int, digest: str | None = None) -> bytes:
    """Read a file of a known size and SHA-256, if given: whatever a manifest claims, no more is allocated."""
    try:
        data = store.read(key, size)
    except FileNotFoundError as error:
        raise CacheError(f"{store}/{key} cannot be read: {error.strerror or 'it is missing'}") from error
    if len(data) != size:
        raise CacheError(f"{store}/{key} has {len(data)} bytes, the manifest implies {size}")
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CacheError(f"{store}/{key}: its values differ from the manifest's digest")
    return data
