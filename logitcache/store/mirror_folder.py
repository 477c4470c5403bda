"""Where copies of caches at URLs lie on this machine, and how many bytes of shards they may hold.

All runs of the machine share the folder. Each cache has a folder in it, with the URL beside its files. Shards that
nobody asked for the longest are removed first; a file that is removed stays readable where it is mapped.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from logitcache.errors import CacheError, RecipeError
from logitcache.store.arrays import COMMITS, SHARD_NAME
from logitcache.store.bounded_folder import Held, make_room, quarter_of, told_size
from logitcache.store.file_locks import PART, remove_abandoned
from logitcache.store.files import user_cache_directory

FOLDER, SIZE = "LOGITCACHE_LOCAL_COPY", "LOGITCACHE_LOCAL_COPY_SIZE"
"""The environment variables that say where, and how many bytes; these may end in K, M or G."""

USED = "used"
"""In the folder of a copy: an empty file for each view, as old as its last use."""

TRIES = 3
"""How often what other runs push out of a copy is brought before it is read."""

_SECONDS = 5.0
"""After which what other processes brought is counted again."""


class Room:
    """A folder of copies, and the bytes of shards that it may hold."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._changing = threading.Lock()
        self._left, self._promised, self._counted = 0, 0, -_SECONDS

    @contextmanager
    def made(self, wanted: int) -> Iterator[None]:
        """Remove the least recently used shards until `wanted` more bytes fit, which are then written in the block.

        Raises CacheError where they never fit.
        """
        if wanted > self.limit:
            raise CacheError(
                f"a shard of {wanted} bytes does not fit into the local copy, of {self.limit} bytes. "
                f"Fix: {SIZE}={wanted} or more"
            )
        with self._changing:
            if wanted > self._left or time.monotonic() - self._counted > _SECONDS:
                self._left, self._counted = self._counted_room(wanted), time.monotonic()
            self._left -= wanted
            self._promised += wanted
        try:
            yield
        finally:
            with self._changing:
                self._promised -= wanted

    def _counted_room(self, wanted: int) -> int:
        """Return how many bytes are left, once `wanted` are."""
        held = [found for copy in _folders(self.folder) for found in _shards(copy)]
        return make_room(held, self.limit - self._promised - sum(file.size for file in held), wanted)


def _shards(copy: Path) -> list[Held]:
    """List the shards of a copy."""
    used = {file.name: file.stat().st_mtime for file in _files(copy / USED)}
    found = []
    arrays = [array for cache in _folders(copy) for array in _folders(cache) if not array.name.endswith(COMMITS)]
    for file in (file for array in arrays for file in _files(array)):
        match = SHARD_NAME.fullmatch(file.name.removesuffix(PART))
        with suppress(FileNotFoundError):
            if match and file.name.endswith(PART):
                remove_abandoned(file)
            if match:
                status = file.stat(follow_symlinks=False)
                found.append(Held(max(status.st_mtime, used.get(match[1], 0.0)), status.st_size, str(file)))
    return found


def _folders(folder: Path) -> list[Path]:
    return [file for file in _entries(folder) if file.is_dir() and not file.is_symlink()]


def _files(folder: Path) -> list[Path]:
    return [file for file in _entries(folder) if not file.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_shard(key: str) -> bool:
    """Whether a file is one that may be removed from a copy at any time."""
    folder, _, name = key.rpartition("/")
    return SHARD_NAME.fullmatch(name) is not None and "/" not in folder and not folder.endswith(COMMITS)


def copies_folder() -> Path | None:
    """Return the folder of the copies; None for a user who has no home and names none."""
    told = os.environ.get(FOLDER, "").strip()
    if told:
        return Path(os.path.abspath(os.path.expanduser(told)))
    directory = user_cache_directory()
    return directory / "copies" if directory else None


def room() -> Room:
    """Return the room for copies: by default a quarter of the disk's space.

    Raises RecipeError for what is no size, and for a user who has no home and names no folder.
    """
    folder, limit = copies_folder(), told_size(SIZE)
    if folder is None:
        raise RecipeError(f"there is no home directory to keep copies of remote caches in. Fix: {FOLDER}=a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        quarter = quarter_of(folder)
    except OSError as error:
        raise CacheError(f"{folder} cannot be used: {error.strerror}. Fix: {FOLDER}=a folder to write to") from error
    return Room(folder, quarter if limit is None else limit)
