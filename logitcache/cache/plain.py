"""What a cache from anywhere is made of: plain files, none of which leads out of it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from logitcache.errors import CacheError

MAX_METADATA_BYTES = 64 << 20
_SMALL = ("label", "digest", "canary")


def require_plain(root: Path) -> None:
    """Raise CacheError for a link, a pipe or endless metadata in what is read before the manifest is known.

    Files of shards are looked at when they are compared and mapped.
    """
    for path in _read_first(root):
        try:
            status = path.lstat()
        except OSError:
            continue  # whoever reads it says what is missing
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise CacheError(
                f"{path} is no regular file, and no link in a cache is followed. Fix: copy the cache with the files "
                "themselves (cp -rL)"
            )
        if path.name == "zarr.json" and status.st_size > MAX_METADATA_BYTES:
            raise CacheError(
                f"{path} has {status.st_size} bytes, metadata has {MAX_METADATA_BYTES} at most. Fix: restore it"
            )


def _read_first(root: Path) -> Iterator[Path]:
    """List the metadata of the root and of its arrays, the folders of these, and all of the small ones."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(root)]
    except OSError:
        return
    for folder in folders:
        yield folder
        yield folder / "zarr.json"
    for name in _SMALL:
        for parent, below, files in os.walk(root / name):
            yield from (Path(parent, found) for found in (*below, *files))
