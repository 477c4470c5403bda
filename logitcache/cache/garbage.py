"""What killed writers left behind: found, and removed, without touching what is committed or in work."""

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.arrays import ArrayGroup
from logitcache.cache.create import read_manifest
from logitcache.cache.growth import read_growth
from logitcache.cache.layout import Layout, layout_of
from logitcache.cache.manifest import Manifest
from logitcache.cache.sharing import alone, preparing, try_creating
from logitcache.cache.skeleton import GROWING, ROOT
from logitcache.errors import CacheError
from logitcache.files import leftovers

_CHUNK = re.compile(r"c\.(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})(\.0)+")
_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"
_TABLE = re.compile(rf"{_NAME}\.{_NAME}\.(basis|centre|deviation|correction_step|weight|bias)")


@dataclass(frozen=True)
class Garbage:
    """A file or a folder that nothing needs, why, and how many bytes it takes."""

    path: str
    why: str
    bytes: int


def collect(root: Path, *, dry_run: bool = False, growth: bool = False) -> list[Garbage]:
    """Remove what killed writers left in a cache and beside it; returns what it was.

    `growth` gives up a growth that is not finished too: the views and teachers that the root does not describe.
    `dry_run` only lists. Raises CacheError where a precompute is at work, and where there is no cache and no beginning
    of one.
    """
    with ExitStack() as held:
        beside = held.enter_context(try_creating(root))
        found = [] if beside is None else [_garbage(beside, "a cache that was never finished being created")]
        if not found or (root / ROOT).exists():
            manifest = read_manifest(root)
            held.enter_context(preparing(root))
            if not alone(root):
                raise CacheError(f"{root} is being written by a precompute. Fix: wait for it, or stop it")
            found += _unneeded(root, manifest, growth)
        for garbage in () if dry_run else found:
            _remove(Path(garbage.path))
    return found


def _unneeded(root: Path, manifest: Manifest, growth: bool) -> Iterator[Garbage]:
    for path in leftovers(root):
        yield _garbage(path, "a file that was only half written, or a claim")
    whole = layout_of(manifest)
    begun = whole
    try:
        begun = layout_of(read_growth(root, manifest))
    except CacheError:
        if not growth:
            raise
    kept = whole if growth else begun
    names = {group.name for group in kept.groups}
    for group in kept.groups:
        yield from _chunks(root, kept, group)
    for group in begun.groups:
        # The records first: a shard without one is nothing.
        parts = (group.commits, *(array.name for array in group.arrays), *(table.name for table in group.tables))
        for name in parts if group.name not in names else ():
            if (root / name).is_dir():
                yield _garbage(root / name, "of a growth that is given up")
    known = {table.name for table in begun.tables}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and _TABLE.fullmatch(folder.name) and folder.name not in known:
            yield _garbage(folder, "a table of a growth that never began")
    if growth and (root / GROWING).exists():
        # Last: until then it says whose these shards are.
        yield _garbage(root / GROWING, "the note of a growth that is given up")


def _chunks(root: Path, layout: Layout, group: ArrayGroup) -> Iterator[Garbage]:
    """Yield records of views that there are not, and shards without a record."""
    recorded = set()
    for file, place in _numbered(root / group.commits):
        if place[0] < layout.num_views and place[1] < layout.shards_per_view:
            recorded.add(place)
        else:
            yield _garbage(file, "of views that the cache does not have")
    for array in group.arrays:
        for file, place in _numbered(root / array.name):
            if place not in recorded:
                yield _garbage(file, "a shard that was never committed")


def _numbered(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _CHUNK.fullmatch(file.name)
        if match and (file.is_file() or file.is_symlink()):
            yield file, (int(match[1]), int(match[2]))


def _garbage(path: Path, why: str) -> Garbage:
    files = [path] if not path.is_dir() or path.is_symlink() else [file for file in path.rglob("*") if file.is_file()]
    return Garbage(str(path), why, sum(file.lstat().st_size for file in files))


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"{path} cannot be removed: {error.strerror}. Fix: make its folder writable") from error
