"""Grow a cache: write the note of the growth, replace the root at its end, remove staged files."""

import json
from collections.abc import Mapping
from contextlib import suppress

from logitcache.cache.format.growth import GROWING_IDS, Growth, NewImages, read_growth, read_note
from logitcache.cache.format.layout import Layout, layout_of, staged_between
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.format.metadata import metadata_files
from logitcache.cache.format.root import GROWING, ROOT, read_manifest
from logitcache.cache.snapshot import Snapshot
from logitcache.cache.write.error_summary import with_errors
from logitcache.cache.write.writer import commit_record
from logitcache.cache.write.writer_locks import PREPARING, WRITING
from logitcache.store.base import Store
from logitcache.store.files import explained, sync_directory


def begin_growth(store: Store, goal: Manifest, files: Mapping[str, bytes]) -> None:
    """Write the note of a growth before its first shard, and create the folders of the shards.

    `files`, new tables and ids by key, are written first: the note names their digests.
    """
    _update(store, files)
    root, recorded = store.path, read_manifest(store)
    images = NewImages.between(recorded, goal)
    growth = Growth(num_views=goal.views.num_views, teachers=goal.teachers, versions=goal.versions, images=images)
    _update(store, {GROWING: json.dumps(growth.model_dump(mode="json")).encode()})
    for group in layout_of(goal, staged_between(recorded, goal)).groups:
        for name in group.folders:
            with explained(root / name):
                (root / name).mkdir(exist_ok=True)
    with explained(root):
        sync_directory(root)


def finish_growth(grown: Snapshot, samples: Mapping[str, bytes]) -> None:
    """Replace the root by that of the grown cache, whose shards are all committed, with the errors over all rows.

    `samples` are the files of labels, digests, ids and sizes, by key. Staged shards replace the shorter ones; a reader
    that opened the cache before derives the shorter bytes from them.
    """
    _place_staged(grown)
    files = {**samples, **metadata_files(grown.manifest)}
    _update(grown.store, {key: data for key, data in files.items() if key != ROOT})
    _update(grown.store, {ROOT: metadata_files(with_errors(grown))[ROOT]})
    if samples:
        forget_staged(grown.store, grown.layout)


def _place_staged(grown: Snapshot) -> None:
    """Write the staged shards under their final keys, the arrays of a group before its commit records."""
    unstaged = [group.with_staged(None) for group in grown.layout.groups]
    for shard in filter(grown.layout.is_staged, grown.shards if grown.layout.staged else ()):
        for group, final in zip(grown.layout.groups, unstaged, strict=True):
            records = []
            for part, array in zip(grown.stored(group, shard), final.arrays, strict=True):
                data = memoryview(grown.store.read_shard(part))
                grown.store.write(array.file(shard), data)
                records.append(commit_record(data, array.file(shard)))
            grown.store.write(final.record_file(shard), b"".join(records))


def _update(store: Store, files: Mapping[str, bytes]) -> None:
    """Write files that the store does not hold as they are; those that writers lock are changed in place."""
    for key, data in files.items():
        if store.holds(key, data):
            continue
        if key in (PREPARING, WRITING):
            store.rewrite(key, data)
        else:
            with explained(store.path / key):
                (store.path / key).parent.mkdir(parents=True, exist_ok=True)
            store.write(key, data)


def forget_growth(store: Store, recorded: Manifest) -> None:
    """Remove the note of a finished growth, unless another run has begun to add more.

    Staged files are removed before the note, which names them.
    """
    if store.exists(GROWING) and read_growth(store, recorded) == recorded:
        growth = read_note(store)
        if growth is not None and growth.images is not None:
            forget_staged(store, layout_of(growth.applied(recorded), growth.images.staged))
        with explained(store.path / GROWING):
            store.remove([GROWING])


def forget_staged(store: Store, layout: Layout) -> None:
    """Remove the staged shards of a growth, commit records first, and the ids of the grown cache."""
    shards = [shard for shard in layout.shards() if layout.is_staged(shard)]
    store.remove([group.record_file(shard) for group in layout.groups for shard in shards])
    store.remove([array.file(shard) for array in layout.arrays for shard in shards])
    store.remove([GROWING_IDS])
    for group in layout.groups:
        for name in group.staged_folders:
            with suppress(OSError):  # of a mirror, which makes folders as they are needed
                (store.path / name).rmdir()
