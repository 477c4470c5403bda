"""From where a cache is to the folder in which its files are read: of a cache at a URL, a copy that is up to date."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from logitcache.cache.arrays import RECORD
from logitcache.cache.copies import Copy, copy_of, place_of
from logitcache.cache.growth import read_growth
from logitcache.cache.labels import label_file
from logitcache.cache.layout import Layout, layout_of, require_possible
from logitcache.cache.manifest import Manifest, parse_manifest
from logitcache.cache.skeleton import CANARIES, DIGESTS, GROWING, ROOT, skeleton_arrays, skeleton_problems
from logitcache.cache.unreadable import FILE as UNREADABLE
from logitcache.errors import CacheError
from logitcache.remote import is_remote

MOST_ASKED = 1 << 20
"""Commit records that a web server is asked for."""


def locate(location: str | Path, *, fresh: bool = False) -> Path:
    """Return the folder in which a cache is read. What is read of it first is brought there: all but the shards.

    `fresh` reads that from the storage even where the copy seems to have it. Raises RemoteError where the storage does
    not answer.
    """
    if not is_remote(location):
        return Path(location)
    return _refreshed(copy_of(os.fspath(location)), fresh)


def refresh(root: Path) -> None:
    """Bring what has changed of a cache elsewhere since it was located."""
    place = place_of(root)
    if not place.is_here:
        locate(str(place))


def _refreshed(copy: Copy, fresh: bool) -> Path:
    with copy.creating():
        try:
            root = copy.remote.read(ROOT)
        except FileNotFoundError:
            copy.clear()
            return copy.path
        manifest = _parsed(root)
        if manifest is not None:
            is_same = not fresh and _bytes(copy.path / ROOT) == root
            _update(copy, (GROWING, UNREADABLE), fresh, False)
            goal = _goal(copy.path, manifest)
            _update(copy, _skeleton(goal), fresh, is_same)
            _update_records(copy, layout_of(goal), fresh, is_same)
        copy.keep(ROOT, root)
        if manifest is not None:
            # What a disk here has lost or changed is in the storage.
            _update(copy, [problem.key for problem in skeleton_problems(copy.path, manifest)], True, False)
    return copy.path


def _parsed(root: bytes) -> Manifest | None:
    """Return the manifest; None for one that whoever reads it will say why it cannot be used."""
    try:
        manifest = parse_manifest(json.loads(root)["attributes"], "")
        require_possible(manifest, "")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return manifest


def _goal(root: Path, manifest: Manifest) -> Manifest:
    try:
        return read_growth(root, manifest)
    except CacheError:
        return manifest


def _skeleton(manifest: Manifest) -> list[str]:
    arrays = [f"{options['name']}/{ROOT}" for options in skeleton_arrays(manifest)]
    tables = [table.file for table in layout_of(manifest).tables]
    return [*arrays, *tables, label_file(manifest.fingerprint).key, DIGESTS, CANARIES]


def _update(copy: Copy, keys: Iterable[str], fresh: bool, is_same: bool) -> None:
    """Let the copy have some files as the storage does, or lack them."""

    def one(key: str) -> None:
        here = _bytes(copy.path / key)
        try:
            if here is None or not _is_known(copy, key, here, fresh, is_same):
                copy.keep(key, copy.remote.read(key))
        except FileNotFoundError:
            copy.drop(key)

    for _ in copy.remote.each(one, list(keys)):
        pass


def _is_known(copy: Copy, key: str, here: bytes, fresh: bool, is_same: bool) -> bool:
    """Whether a file need not be read again: by its tag, or, of a web server, as the root is the same."""
    if fresh:
        return False
    return is_same if not copy.remote.is_listable else _has_tag(here, copy.remote.entry(key).tag)


def _has_tag(data: bytes, tag: str) -> bool:
    """Whether a tag is the MD5 of some bytes, as those of S3 are where no key of the user's own encrypts."""
    return tag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()


def _update_records(copy: Copy, layout: Layout, fresh: bool, is_same: bool) -> None:
    """Let the copy have the commit records as the storage does."""
    if not copy.remote.is_listable:
        if layout.num_shards > MOST_ASKED:
            raise CacheError(
                f"{copy} has {layout.num_shards} shards, and a web server is asked for each commit record. Fix: name "
                "storage that lists what it has, such as s3://bucket/name"
            )
        records = [group.record_file(shard) for group in layout.groups for shard in layout.shards()]
        _update(copy, records, fresh, is_same)
        return
    folders = [group.commits for group in layout.groups]
    found = [item for entries in copy.remote.each(copy.remote.list, folders) for item in entries.items()]
    listed = {key: entry for key, entry in found if _is_record(key)}
    new = [key for key, entry in listed.items() if fresh or not _has_tag(_bytes(copy.path / key) or b"", entry.tag)]
    read = copy.remote.each(lambda key: copy.remote.read_range(key, 0, listed[key].size), new)
    for key, data in zip(new, read, strict=True):
        copy.keep(key, data)
    here = (f"{folder}/{file.name}" for folder in folders for file in (copy.path / folder).glob("c.*"))
    for key in {key for key in here if _is_record(key)} - listed.keys():
        copy.drop(key)


def _is_record(key: str) -> bool:
    return RECORD.fullmatch(key.rpartition("/")[2]) is not None


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
