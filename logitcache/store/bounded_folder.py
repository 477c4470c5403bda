"""Folders of a bounded size: the least recently used files make room for new ones."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from logitcache.errors import RecipeError
from logitcache.store.file_locks import PART, remove_abandoned

_SIZE = re.compile(r"(\d{1,15})([KMG]?)", re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_RECOUNT_SECONDS = 5.0
"""Other processes write to the folder, too: its files are counted again after this time."""

LastUses = Callable[[Path], Iterable[tuple[Path, float]]]
"""The files of a folder that may be removed, and when each was used last, in seconds; their own times count as well."""


def _every_file(folder: Path) -> Iterator[tuple[Path, float]]:
    return ((Path(entry), 0.0) for entry in os.scandir(folder))


class BoundedFolder:
    """A folder whose files take at most `limit` bytes; one that is removed stays readable where it is mapped."""

    def __init__(self, path: Path, limit: int, last_uses: LastUses = _every_file) -> None:
        self.path, self.limit, self._last_uses = path, limit, last_uses
        self._begin()

    def _begin(self) -> None:
        # A fork has none of the threads that its parent waited for.
        self._process, self._changing = os.getpid(), threading.Condition()
        self._free, self._reserved, self._counted = 0, 0, -_RECOUNT_SECONDS

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Remove the least recently used files until `size` more bytes fit, which the context writes.

        If what other threads write leaves too little, wait until they have.
        """
        if self._process != os.getpid():
            self._begin()
        with self._changing:
            while not self._fits(size) and self._reserved:
                self._changing.wait()
            self._free -= size
            self._reserved += size
        try:
            yield
        finally:
            with self._changing:
                self._reserved -= size
                self._changing.notify_all()

    def _fits(self, size: int) -> bool:
        if size > self._free or time.monotonic() - self._counted > _RECOUNT_SECONDS:
            self._free, self._counted = self._make_room(size), time.monotonic()
        return size <= self._free

    def _make_room(self, size: int) -> int:
        """Remove files until `size` bytes are free, if they can be, and return how many are; partial files stay."""
        found = []
        for file, used in self._last_uses(self.path):
            with suppress(FileNotFoundError):
                if file.name.endswith(PART):
                    remove_abandoned(file)
                status = file.lstat()
                found.append((max(used, status.st_mtime), status.st_size, file))
        free = self.limit - self._reserved - sum(num_bytes for _, num_bytes, _ in found)
        for _, num_bytes, file in sorted(found):
            if free >= size:
                break
            if not file.name.endswith(PART):
                file.unlink(missing_ok=True)
                free += num_bytes
        return free


def size_limit(folder: Path, variable: str) -> int:
    """Return the bytes that an environment variable states, or else a quarter of the file system of a folder.

    Raises RecipeError for what is not a size, and OSError.
    """
    stated = os.environ.get(variable, "").strip()
    if not stated:
        system = os.statvfs(folder)
        return system.f_blocks * system.f_frsize // 4
    match = _SIZE.fullmatch(stated.upper())
    if match is None:
        raise RecipeError(
            f"{variable} is {stated!r}, which is no size. Fix: a number of bytes, or one with K, M or G, as 8G"
        )
    return int(match[1]) * _UNITS[match[2]]
