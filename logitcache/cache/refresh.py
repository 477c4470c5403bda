"""Bring a mirror up to date with the storage: the metadata, tables and commit records, all but the shards."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress

from logitcache.cache.format.growth import GROWING_IDS, read_growth
from logitcache.cache.format.layout import Layout, layout_of, require_possible, staged_between
from logitcache.cache.format.manifest import Manifest, parse_manifest
from logitcache.cache.format.metadata import skeleton_limits, skeleton_problems
from logitcache.cache.format.root import GROWING, ROOT
from logitcache.cache.write.unreadable_images import FILE as UNREADABLE
from logitcache.errors import CacheError
from logitcache.store.mirror import Mirror
from logitcache.store.safe_files import MAX_METADATA_BYTES, parse_json
from logitcache.store.shards import RECORD, RECORD_BYTES

MAX_PAGE_BYTES = 1 << 18
"""Most bytes that a server may send for a commit record: a page that reports an error is a damaged record."""

MOST_ASKED = 1 << 20
"""Commit records that a web server is asked for."""


def refresh(mirror: Mirror, fresh: bool) -> None:
    """Update the skeleton and the commit records of a mirror from the storage; clear it if no cache is there.

    `fresh` reads them from the storage even if the mirror seems to have them. Raises RemoteError if the storage does
    not answer.
    """
    with mirror.locked():
        try:
            root = mirror.remote.read(ROOT, most=MAX_METADATA_BYTES)
        except FileNotFoundError:
            mirror.clear()
            return
        manifest = _parsed(root)
        if manifest is not None:
            is_same = not fresh and _here(mirror, ROOT) == root
            _update(mirror, dict.fromkeys((GROWING, UNREADABLE), MAX_METADATA_BYTES), fresh, False)
            goal = manifest
            with suppress(CacheError):  # a damaged note of a growth, which reading it reports
                goal = read_growth(mirror, manifest)
            _update(mirror, {key: most for key, most in skeleton_limits(goal).items() if key != ROOT}, fresh, is_same)
            if goal.num_images != manifest.num_images and goal.appended is not None:
                _update(mirror, {GROWING_IDS: goal.appended.id_bytes}, fresh, False)
                _update_records(mirror, layout_of(manifest), fresh, is_same)
            _update_records(mirror, layout_of(goal, staged_between(manifest, goal)), fresh, is_same)
        mirror.put(ROOT, root)
        if manifest is not None:
            # Files that the disk of the mirror has lost or changed are read again.
            most = skeleton_limits(manifest)
            _update(mirror, {key: most[key] for key, _ in skeleton_problems(mirror, manifest)}, True, False)


def _parsed(root: bytes) -> Manifest | None:
    """Return the manifest; None for one that cannot be used, which `read_manifest` reports."""
    try:
        manifest = parse_manifest(parse_json(root)["attributes"], "")
        require_possible(manifest, "")
    except (ValueError, KeyError, TypeError):
        return None
    return manifest


def _update(mirror: Mirror, most: Mapping[str, int], fresh: bool, is_same: bool) -> None:
    """Update some files of the mirror, or remove them; `most` is their largest size by key."""

    def one(key: str) -> None:
        here = None if fresh else _here(mirror, key)
        try:
            is_known = is_same  # as the root of a web server is the same, else by its tag
            if here is not None and mirror.remote.is_listable:
                is_known = _has_tag(here, mirror.remote.entry(key).tag)
            if here is not None and is_known:
                return
            data = mirror.stored(key, most[key])
        except FileNotFoundError:
            mirror.drop(key)
        except CacheError:  # larger than it may be, which is an error when it is read
            mirror.forget(key)
        else:
            mirror.put(key, data)

    list(mirror.remote.each(one, list(most)))


def _has_tag(data: bytes, tag: str) -> bool:
    """Whether a tag is the MD5 of some bytes, as those of S3 are unless a key of the user's own encrypts."""
    return tag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()


def _update_records(mirror: Mirror, layout: Layout, fresh: bool, is_same: bool) -> None:
    """Update the commit records of the mirror."""
    if not mirror.remote.is_listable:
        if layout.num_shards > MOST_ASKED:
            raise CacheError(
                f"{mirror} has {layout.num_shards} shards, and a web server is asked for each commit record. Fix: name "
                "storage that lists what it has, such as s3://bucket/name"
            )
        records = (group.record_file(shard) for group in layout.groups for shard in layout.shards())
        _update(mirror, dict.fromkeys(records, MAX_PAGE_BYTES), fresh, is_same)
        return
    wanted = [(group, name) for group in layout.groups for name in (group.commits, *group.staged_folders[:1])]
    folders = mirror.remote.each(mirror.remote.list, [name for _, name in wanted])
    for (group, folder), found in zip(wanted, folders, strict=True):
        # A listing may name anything: only names of records are taken from it, and one byte more than they have.
        longest = RECORD_BYTES * len(group.arrays) + 1
        listed = {key: entry for key, entry in found.items() if _is_record(key, folder)}
        new = [key for key, entry in listed.items() if fresh or not _has_tag(_here(mirror, key) or b"", entry.tag)]
        ranges = [(key, min(listed[key].size, longest)) for key in new]
        read = mirror.remote.each(lambda one: mirror.remote.read_range(one[0], 0, one[1]), ranges)
        for key, data in zip(new, read, strict=True):
            mirror.put(key, data)
        here = {f"{folder}/{file.name}" for file in (mirror.path / folder).glob("c.*")}
        for key in {key for key in here if _is_record(key, folder)} - listed.keys():
            mirror.drop(key)


def _is_record(key: str, folder: str) -> bool:
    parent, _, name = key.rpartition("/")
    return parent == folder and RECORD.fullmatch(name) is not None


def _here(mirror: Mirror, key: str) -> bytes | None:
    try:
        return (mirror.path / key).read_bytes()
    except OSError:
        return None
