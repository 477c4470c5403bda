"""Scan memory: arrays that a pass over all images found, remembered until the files change."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.store import digest_index
from logitcache.store.files import memory_file, read_memory, write_memory
from logitcache.views.datasets.base import Labels

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
