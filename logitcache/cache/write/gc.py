"""Garbage collection: remove the leftovers of killed writers, and nothing that is committed or being written."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from logitcache.cache.encodings import Form
from logitcache.cache.encodings.features import FeatureForm
from logitcache.cache.format.arrays import STAGED
from logitcache.cache.format.growth import GROWING_IDS, read_growth
from logitcache.cache.format.layout import Layout, layout_of, staged_between
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.root import GROWING, ROOT, read_manifest
from logitcache.cache.snapshot import Snapshot, locate
from logitcache.cache.write.writer_locks import alone, preparing, try_creating
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.files import LEFTOVER, explained
from logitcache.store.shards import COMMITS, SHARD_NAME

_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"
_TABLE_NAMES = frozenset().union(*(form.table_names for form in (*get_args(get_args(Form)[0]), FeatureForm)))
_TABLE = re.compile(rf"{_NAME}\.{_NAME}\.({'|'.join(sorted(_TABLE_NAMES))})")

Found = Iterator[tuple[str, str]]
"""Keys of unneeded files and folders, each with the reason."""


@dataclass(frozen=True)
class Garbage:
    """An unneeded file or folder, the reason, and its bytes."""

    path: str
    why: str
    bytes: int


def collect(location: str | Path, *, dry_run: bool = False, growth: bool = False) -> list[Garbage]:
    """Remove the leftovers of killed writers in a cache and beside it; returns a list of them.

    `growth` also discards an unfinished growth: the views, teachers and images that the root does not describe.
    `dry_run` only lists. Raises CacheError if a run of this machine writes to the cache, and if neither a cache nor
    an unfinished one exists.
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
            contents = _contents(store, files, manifest, growth)
            for key, why in [unneeded for finder in FINDERS for unneeded in finder(contents)]:
                below = _below(files, key)
                found.append(Garbage(f"{store}/{key}", why, sum(files[file] for file in below)))
                if not dry_run:
                    store.remove(below)
                    _remove_folder(store.path / key)
        if beside is not None and not dry_run:
            _remove_folder(beside)
    return found


class _Contents(NamedTuple):
    """Files and folders of a cache, and three layouts: of its root, of what is kept, and of the growth that was begun.

    `note` is the reason why the note of the growth is not needed; "" if it is needed.
    """

    files: Mapping[str, int]
    folders: frozenset[str]
    root: Layout
    kept: Layout
    begun: Layout
    note: str


def _contents(store: Store, files: Mapping[str, int], manifest: Manifest, growth: bool) -> _Contents:
    try:
        goal = read_growth(store, manifest)
        note = "finished" if goal == manifest else ""
    except CacheError:
        if not growth:
            raise
        goal, note = manifest, ""
    added = goal.num_images - manifest.num_images
    if growth and added > 0 and Snapshot.as_described(store, goal, recorded=manifest).complete:
        raise CacheError(
            f"{store} has grown by {added} images but for the last step. Fix: run the same precompute again, which "
            "finishes it at once"
        )
    begun = layout_of(goal, staged_between(manifest, goal))
    empty = {file.name for file in store.path.iterdir() if file.is_dir()}
    return _Contents(
        files,
        frozenset({key.partition("/")[0] for key in files if "/" in key} | empty),
        layout_of(manifest),
        layout_of(manifest) if growth else begun,
        begun,
        note or ("given up" if growth else ""),
    )


def _partial_files(contents: _Contents) -> Found:
    return ((key, "a file that was only half written, or a claim") for key in contents.files if key.endswith(LEFTOVER))


def _stray_shards(contents: _Contents) -> Found:
    """Find records of views or images that the cache does not have, and shards without a record."""
    layout = contents.kept
    for group in layout.groups:
        for commits, *arrays in (group.with_staged(None).folders, group.staged_folders or (group.commits,)):
            recorded = set()
            for key, view, number in _numbered(contents.files, commits):
                if view < layout.num_views and number < layout.shards_per_view:
                    recorded.add((view, number))
                elif arrays:
                    what = "images" if view < layout.num_views else "views"
                    yield key, f"of {what} that the cache does not have"
            for array in arrays:
                for key, *place in _numbered(contents.files, array):
                    if tuple(place) not in recorded:
                        yield key, "a shard that was never committed"


def _abandoned_groups(contents: _Contents) -> Found:
    """Find the arrays of a discarded growth, commit records first: a shard without a record does not exist."""
    kept = {group.name for group in contents.kept.groups}
    for group in contents.begun.groups:
        parts = (group.commits, *(array.name for array in group.arrays), *(table.name for table in group.tables))
        for name in parts if group.name not in kept else ():
            if name in contents.folders:
                yield name, "of a growth that is given up"


def _staged(contents: _Contents) -> Found:
    """Find shards and ids that were staged for a growth in images, if it is finished or discarded."""
    staged = {name for group in contents.kept.groups for name in group.staged_folders}
    for name in sorted(contents.folders - staged):
        if name.endswith((STAGED, f"{STAGED}{COMMITS}")):
            yield name, "staged for a growth that is finished or given up"
    if contents.kept.staged is None and GROWING_IDS in contents.files and contents.kept == contents.root:
        yield GROWING_IDS, "the ids of a growth that is finished or given up"


def _stray_tables(contents: _Contents) -> Found:
    known = {table.name for table in contents.begun.tables}
    for name in sorted(contents.folders - known):
        if _TABLE.fullmatch(name):
            yield name, "a table of a growth that never began"


def _stale_note(contents: _Contents) -> Found:
    if contents.note and GROWING in contents.files:
        yield GROWING, f"the note of a growth that is {contents.note}"


FINDERS: tuple[Callable[[_Contents], Found], ...] = (
    _partial_files,
    _stray_shards,
    _abandoned_groups,
    _staged,
    _stray_tables,
    _stale_note,  # last: it names the shards
)


def _numbered(files: Mapping[str, int], folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield the shard files of an array, with the view and the shard number from their names."""
    for key in sorted(files):
        parent, _, name = key.rpartition("/")
        match = SHARD_NAME.fullmatch(name) if parent == folder else None
        if match:
            yield key, int(match[1]), int(match[2])


def _below(files: Mapping[str, int], key: str) -> list[str]:
    """List a file, or the files below a folder. A single file does not scan the others: a cache may have a million."""
    return [key] if key in files else [file for file in files if file.startswith(f"{key}/")]


def _beside(path: Path) -> Garbage:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return Garbage(str(path), "a cache that was never finished being created", size)


def _remove_folder(path: Path) -> None:
    with explained(path, "removed", "make its folder writable"):
        if path.is_dir():
            shutil.rmtree(path)
