"""Scan memory: what a pass over all images found, kept until a file below a folder changes."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.store import file_stamps
from logitcache.store.files import keep, kept, user_cache_directory
from logitcache.views.datasets.base import Labels, is_multi_label, label_dtype

_HEAD = 32 + 8  # the digest of the files' stamps, and the columns of multi-hot labels
_MOST_FILES = 3_000_000  # a root such as "/" is not walked to its end


class Scan(NamedTuple):
    """Labels [n] or [n, C], sizes [n, 2] (height, width) and digests [n] of all images."""

    labels: Labels
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint64]


@dataclass(frozen=True)
class ScanMemory:
    """The memory of one data set that is made of the files below `root` and of nothing else.

    `files` names them, if they are known; else all are looked at. `name` tells apart what is made
    of the same files: options and the versions that decode them. `opened_ns` is a moment before the
    files were opened: the data set may hold them in memory, so nothing is said about files that
    changed since.
    """

    root: Path
    name: str
    opened_ns: int
    files: tuple[str, ...] | None = None

    def recall(self, num_images: int) -> Scan | None:
        """Return what was found before, if no file has changed since."""
        stored = kept(self._path())
        if stored is None or len(stored) < _HEAD + 24 * num_images:
            return None
        state = self._state()
        if state is None or stored[:32] != state:
            return None
        numbers = np.frombuffer(stored, "<u8", 3 * num_images, _HEAD)
        labels = _labels(stored[_HEAD + numbers.nbytes :], num_images, int.from_bytes(stored[32:_HEAD], "little"))
        if labels is None:
            return None
        sizes, digests = np.split(numbers, [2 * num_images])
        return Scan(labels, sizes.astype(np.int64).reshape(-1, 2), digests.astype(np.uint64))

    def remember(self, scan: Scan) -> None:
        """Keep what a pass found, unless a file changed around the opening or since."""
        state = self._state()
        if state is not None:
            columns = scan.labels.shape[1] if is_multi_label(scan.labels) else 0
            labels = scan.labels.astype(label_dtype(scan.labels.ndim))
            found = [scan.sizes.astype("<i8"), scan.digests.astype("<u8"), labels]
            head = state + columns.to_bytes(8, "little")
            keep(self._path(), head + b"".join(part.tobytes() for part in found))

    def _path(self) -> Path | None:
        directory = user_cache_directory()
        identity = os.fsencode(self.root) + b"\n" + self.name.encode()
        name = hashlib.sha256(identity).hexdigest()[:32]
        return directory / f"{name}.scan" if directory else None

    def _state(self) -> bytes | None:
        """Return the digest of all stamps below the root; None if one is not old enough."""
        state = hashlib.sha256()
        for num_files, path in enumerate(self._paths(), 1):
            try:
                stamp = file_stamps.stamp(os.stat(path))
            except OSError:
                stamp = file_stamps.NO_STAMP
            if not file_stamps.settled(stamp, self.opened_ns) or num_files > _MOST_FILES:
                return None
            state.update(os.fsencode(path) + repr(stamp).encode() + b"\n")
        return state.digest()

    def _paths(self) -> Iterator[str]:
        if self.files is not None:
            yield from (os.path.join(self.root, name) for name in self.files)
            return
        for parent, folders, names in os.walk(self.root, followlinks=True):
            folders.sort()
            yield from (os.path.join(parent, name) for name in sorted(names))


def _labels(stored: bytes, num_images: int, columns: int) -> Labels | None:
    """Read the labels of a scan, of so many columns or, with 0, of one class an image; None for another length."""
    if len(stored) != num_images * (columns or 8):
        return None
    if columns:
        return np.frombuffer(stored, np.int8).reshape(num_images, columns)
    return np.frombuffer(stored, "<i8").astype(np.int64)
