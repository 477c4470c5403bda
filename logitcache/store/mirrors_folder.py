"""The folder of all mirrors on this machine, which all runs share.

Each mirror has a folder in it, with the URL beside its files. The shards of the least recently used views are removed
first.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from logitcache.errors import CacheError, RecipeError
from logitcache.store.bounded_folder import BoundedFolder, size_limit
from logitcache.store.file_locks import PART
from logitcache.store.files import explained, user_cache_directory
from logitcache.store.shards import COMMITS, SHARD_NAME

FOLDER, SIZE = "LOGITCACHE_LOCAL_COPY", "LOGITCACHE_LOCAL_COPY_SIZE"
"""Environment variables: where the folder is, and how many bytes of shards it may hold, as 8G."""

USED = "used"
"""Folder beside a mirror: an empty file for each view, as old as its last use."""


def mirrors_folder() -> BoundedFolder:
    """Return the folder of all mirrors.

    Raises RecipeError for a limit that is not a size, and for a user who has no home directory and names no folder.
    """
    if stated := os.environ.get(FOLDER, "").strip():
        folder = Path(os.path.abspath(os.path.expanduser(stated)))
    elif home := user_cache_directory():
        folder = home / "copies"
    else:
        raise RecipeError(f"there is no home directory to keep copies of remote caches in. Fix: {FOLDER}=a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return BoundedFolder(folder, size_limit(folder, SIZE), mirrored_shards)
    except OSError as error:
        raise CacheError(f"{folder} cannot be used: {error.strerror}. Fix: {FOLDER}=a folder to write to") from error


def mirrored_shards(folder: Path) -> Iterator[tuple[Path, float]]:
    """Yield the shards of all mirrors, and when their views were used last; links are not followed."""
    used = {(file.parent.parent.name, file.name): file.stat().st_mtime for file in folder.glob(f"*/{USED}/*")}
    for parent, _, names in os.walk(folder):
        mirror, *rest = Path(parent).relative_to(folder).parts or ("",)
        for name in names if len(rest) == 2 and not rest[1].endswith(COMMITS) else ():
            if match := SHARD_NAME.fullmatch(name.removesuffix(PART)):
                yield Path(parent, name), used.get((mirror, match[1]), 0.0)


def writable(file: Path) -> AbstractContextManager[None]:
    """Turn an error of the file system into a CacheError that names the mirror."""
    return explained(f"the local copy {file}", more=f"; or a smaller {SIZE}, or {FOLDER}=another folder")
