"""Remote memory: what a pass over the files at a URL found, kept as long as the storage gives the same tags."""

import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from logitcache.runtime.console import track
from logitcache.store import file_stamps
from logitcache.store.files import keep, kept, user_cache_directory
from logitcache.store.remote.client import Entry, Remote
from logitcache.store.turns import turn

_BLOCK = 1024  # files whose results are awaited together
_FOUND = struct.Struct("<Q3q")  # digest, height, width, orientation: as long as the digests that stamps keep


class Found(NamedTuple):
    """Digests [n] and heads [n, 3] (height, width, orientation) of all images."""

    digests: NDArray[np.uint64]
    heads: NDArray[np.int64]


class RemoteMemory:
    """The memory of the files of some names below a URL."""

    def __init__(self, remote: Remote, names: Sequence[str]) -> None:
        self._remote = remote
        self._names = names

    def found(self, entries: Sequence[Entry], measure: Callable[[int], tuple[int, ...]]) -> Found:
        """Return what `measure` (digest, height, width, orientation) found; asked only for files of another tag.

        Files without a tag are measured each time. What was measured is kept, also when a pass is interrupted.
        """
        path = self._path()
        rows = file_stamps.as_rows(self._row(number, entry) for number, entry in enumerate(entries))
        if not _recalled(path, rows).all():
            with turn(path, threading.Event()):
                self._measure_rest(path, rows, measure)
        numbers = np.ascontiguousarray(rows["digest"]).view("<i8")
        return Found(numbers[:, 0].astype(np.int64).view(np.uint64), numbers[:, 1:4].astype(np.int64))

    def _measure_rest(
        self, path: Path | None, rows: file_stamps.Rows, measure: Callable[[int], tuple[int, ...]]
    ) -> None:
        known = _recalled(path, rows)
        todo = np.flatnonzero(~known).tolist()
        measured: list[bytes] = []
        try:
            every = (found for block in _blocks(todo) for found in self._remote.each(measure, block))
            measured.extend(_FOUND.pack(*found) for found in track(every, f"reading {self._remote}", len(todo)))
        finally:
            done = todo[: len(measured)]
            rows["digest"][done] = np.frombuffer(b"".join(measured), np.uint8).reshape(-1, _FOUND.size)
            known[done] = True
            if done:
                keep(path, file_stamps.StampIndex(kept(path) or b"").merged(rows[known]))

    def _row(self, number: int, entry: Entry) -> bytes:
        return file_stamps.packed_row(f"{self._remote}/{self._names[number]}", file_stamps.stamp_of_tag(*entry))

    def _path(self) -> Path | None:
        directory = user_cache_directory()
        name = hashlib.sha256(self._remote.url.encode()).hexdigest()[:32]
        return directory / f"{name}.remote-heads-pillow-{PIL.__version__}" if directory else None


def _recalled(path: Path | None, rows: file_stamps.Rows) -> NDArray[np.bool_]:
    """Fill in what was found before; returns for which rows it was."""
    return file_stamps.StampIndex(kept(path) or b"").fill(rows)


def _blocks(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK)]
