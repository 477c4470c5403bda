"""Scan memory: arrays that a pass over all images found, remembered until the files change."""

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.store import digest_index
from logitcache.store.files import memory_file, read_memory, write_memory
from logitcache.views.datasets.base import Labels
from logitcache.views.datasets.images.labels import num_classes_of

_STATE_BYTES = 32
_MOST_FILES = 3_000_000  # a root such as "/" is not walked to its end


def remember_scan(path: Path | None, state: bytes, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays for a state of the files, a digest of 32 bytes, if the user has a cache directory."""
    buffer = io.BytesIO()
    members: dict[str, Any] = dict(arrays)
    np.savez(buffer, **members)
    write_memory(path, state + buffer.getvalue())


def recall(path: Path | None, state: bytes) -> dict[str, NDArray[Any]] | None:
    """Read the arrays of a state; None if there are none, or those of another state."""
    stored = read_memory(path)
    if stored is None or stored[:_STATE_BYTES] != state:
        return None
    with np.load(io.BytesIO(stored[_STATE_BYTES:]), allow_pickle=False) as arrays:
        return dict(arrays)


class Scan(NamedTuple):
    """Labels [n] or [n, C], sizes [n, 2] (height, width) or heads [n, 3], and digests [n] of all images."""

    labels: Labels
    sizes: NDArray[np.int64]
    digests: NDArray[np.uint64]


@dataclass(frozen=True)
class ScanMemory:
    """The memory of one data set that is made of the files below `root` and of nothing else.

    `files` names them, if they are known; else all are looked at. `name` distinguishes results of the same files:
    options and the versions that decode them. `opened_ns` is a moment before the files were opened: the data set may
    hold them in memory, so a file that changed since then makes the memory unusable.
    """

    root: Path
    name: str
    opened_ns: int
    files: tuple[str, ...] | None = None

    def recall(self, num_images: int) -> Scan | None:
        """Return the remembered scan, if no file has changed since."""
        state = self._state()
        found = None if state is None else recall(self._path(), state)
        return Scan(**found) if found is not None and len(found["labels"]) == num_images else None

    def remember(self, scan: Scan) -> None:
        """Remember a scan, unless a file changed around the opening or since."""
        state = self._state()
        if state is not None:
            remember_scan(self._path(), state, scan._asdict())

    def _path(self) -> Path | None:
        return memory_file(f"{self.root}\n{self.name}", "scan.npz")

    def _state(self) -> bytes | None:
        """Return the digest of all stamps below the root; None if one is not old enough."""
        state = hashlib.sha256()
        for num_files, path in enumerate(self._paths(), 1):
            try:
                stamp = digest_index.stamp(os.stat(path))
            except OSError:
                stamp = digest_index.NO_STAMP
            if not digest_index.settled(stamp, self.opened_ns) or num_files > _MOST_FILES:
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


class ScannedImages(ABC):
    """Images whose labels and digests one pass over all of them finds, when asked for; `name` is for messages.

    The number of classes is the one stated, by `num_classes` or the names, else one more than the largest label; of
    multi-hot labels their length.
    """

    def __init__(
        self,
        ids: Sequence[str],
        name: str,
        class_names: tuple[str, ...] | None,
        num_classes: int | None,
        memory: ScanMemory | None,
    ) -> None:
        self.ids = ids
        self._name, self._class_names, self._memory = name, class_names, memory
        self._stated = num_classes or (len(class_names) if class_names else None)

    @abstractmethod
    def _read_all(self) -> Scan:
        """Read every image once; raises DataError naming one that cannot be used."""

    @functools.cached_property
    def scan(self) -> Scan:
        """Labels, sizes or heads, and digests; every image is read once, unless a scan is remembered."""
        if self._memory and (remembered := self._memory.recall(len(self.ids))) is not None:
            return remembered
        found = self._read_all()
        if self._memory:
            self._memory.remember(found)
        return found

    @property
    def labels(self) -> Labels:
        """Class indices [n], -1 if there is no label; or multi-hot rows [n, C]."""
        return self.scan.labels

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None if no image has a label."""
        return num_classes_of(self.labels, self._stated, self.ids, self._name)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if there are none or no image has a label."""
        names = self._class_names
        return names if names and self.num_classes == len(names) else None

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all images [n]."""
        return self.scan.digests
