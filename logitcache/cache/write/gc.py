"""What killed writers left behind: found, and removed, without touching what is committed or in work."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from logitcache.cache.format.layout import Layout, layout_of
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import GROWING, ROOT
from logitcache.cache.snapshot import locate, read_manifest
from logitcache.cache.write.claims import alone, preparing, try_creating
from logitcache.cache.write.growth import read_growth
from logitcache.errors import CacheError
from logitcache.store.arrays import SHARD_NAME, ArrayGroup
from logitcache.store.base import Store
from logitcache.store.files import LEFTOVER

_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"
_TABLE = re.compile(rf"{_NAME}\.{_NAME}\.(basis|centre|deviation|correction_step|weight|bias)")


@dataclass(frozen=True)
class Garbage:
    """A file or a folder that nothing needs, why, and how many bytes it takes."""

    path: str
    why: str
    bytes: int


def collect(location: str | Path, *, dry_run: bool = False, growth: bool = False) -> list[Garbage]:
    """Remove what killed writers left in a cache and beside it; returns what it was.

    `growth` gives up a growth that is not finished too: the views and teachers that the root does not describe.
    `dry_run` only lists. Raises CacheError where a run of this machine writes to it, and where there is no cache
    and no beginning of one.
    """
    store = locate(location)
    with ExitStack() as held:
        beside = held.enter_context(try_creating(store))
        found = [] if beside is None else [_beside(beside)]
        if not found or (store.path / ROOT).exists():
            manifest = read_manifest(store)
            held.enter_context(preparing(store))
            if not alone(store):
                raise CacheError(f"{store} is being written by a run. Fix: wait for it, or stop it")
            files = store.sizes()
            inside = [*_unneeded(store, files, manifest, growth)]
            found += [Garbage(f"{store}/{key}", why, _bytes(files, key)) for key, why in inside]
            for key in () if dry_run else (key for key, _ in inside):
                _remove(store, files, key)
        if beside is not None and not dry_run:
            _remove_tree(beside)
    return found


def _unneeded(store: Store, files: Mapping[str, int], manifest: Manifest, growth: bool) -> Iterator[tuple[str, str]]:
    """Yield the keys of files and folders that nothing needs, with the reason."""
    for key in files:
        if key.endswith(LEFTOVER):
            yield key, "a file that was only half written, or a claim"
    whole = layout_of(manifest)
    begun, goal = whole, None
    try:
        goal = read_growth(store, manifest)
        begun = layout_of(goal)
    except CacheError:
        if not growth:
            raise
    kept = whole if growth else begun
    names = {group.name for group in kept.groups}
    for group in kept.groups:
        yield from _chunks(files, kept, group)
    folders = {key.partition("/")[0] for key in files if "/" in key}
    folders |= {file.name for file in store.path.iterdir() if file.is_dir()}  # with nothing in them yet
    for group in begun.groups:
        # The records first: a shard without one is nothing.
        parts = (group.commits, *(array.name for array in group.arrays), *(table.name for table in group.tables))
        for name in parts if group.name not in names else ():
            if name in folders:
                yield name, "of a growth that is given up"
    known = {table.name for table in begun.tables}
    for name in sorted(folders):
        if _TABLE.fullmatch(name) and name not in known:
            yield name, "a table of a growth that never began"
    if GROWING in files and (growth or goal == manifest):
        # Last: until then it names the shards.
        yield GROWING, "the note of a growth that is " + ("finished" if goal == manifest else "given up")


def _chunks(files: Mapping[str, int], layout: Layout, group: ArrayGroup) -> Iterator[tuple[str, str]]:
    """Yield records of views that there are not, and shards without a record."""
    recorded = set()
    for key, place in _numbered(files, group.commits):
        if place[0] < layout.num_views and place[1] < layout.shards_per_view:
            recorded.add(place)
        else:
            yield key, "of views that the cache does not have"
    for array in group.arrays:
        for key, place in _numbered(files, array.name):
            if place not in recorded:
                yield key, "a shard that was never committed"


def _numbered(files: Mapping[str, int], folder: str) -> Iterator[tuple[str, tuple[int, int]]]:
    for key in sorted(files):
        parent, _, name = key.rpartition("/")
        match = SHARD_NAME.fullmatch(name) if parent == folder else None
        if match:
            yield key, (int(match[1]), int(match[2]))


def _below(files: Mapping[str, int], key: str) -> list[str]:
    """List a file, or the files in a folder; of a file without a look at all others, as there may be a million."""
    return [key] if key in files else [file for file in files if file.startswith(f"{key}/")]


def _bytes(files: Mapping[str, int], key: str) -> int:
    return sum(files[file] for file in _below(files, key))


def _beside(path: Path) -> Garbage:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return Garbage(str(path), "a cache that was never finished being created", size)


def _remove(store: Store, files: Mapping[str, int], key: str) -> None:
    store.remove(_below(files, key))
    if (store.path / key).is_dir():
        _remove_tree(store.path / key)


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CacheError(f"{path} cannot be removed: {error.strerror}. Fix: make its folder writable") from error
