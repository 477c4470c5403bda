"""Shard index: the samples of an archive, found in one pass over its bytes and kept until it changes."""

import hashlib
import io
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError, LogitCacheError
from logitcache.store.file_locks import turn
from logitcache.store.files import memory_file
from logitcache.store.remote.client import Entry
from logitcache.views.datasets.archives.shard_files import TarShard
from logitcache.views.datasets.archives.tar_members import TarMember, members
from logitcache.views.datasets.base import digest_of
from logitcache.views.datasets.images.ids import PackedIds, narrowed
from logitcache.views.datasets.images.image_files import HEADERS, extension_names, head_of, is_read, some
from logitcache.views.datasets.scan_memory import recall, remember_scan

LABEL = ".cls"
Unsigned = NDArray[np.unsignedinteger[Any]]

_reading = threading.BoundedSemaphore(4)  # archives read through at a time: each holds some of its parts in memory


class Places(NamedTuple):
    """The first byte and the length of each image in its archive, [n], its digest [n], its head [n, 3].

    Numbers have the narrowest type that holds them.
    """

    starts: Unsigned
    lengths: Unsigned
    digests: Unsigned
    heads: Unsigned

    def pieces(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return the first byte and the length of each image."""
        rows = list(indices)
        return list(zip(self.starts[rows].tolist(), self.lengths[rows].tolist(), strict=True))


class ShardIndex(NamedTuple):
    """The images of an archive: `labels` are the different label texts, None first, `label_of` [n] points to them."""

    ids: PackedIds
    places: Places
    labels: list[bytes | None]
    label_of: Unsigned


class _Sample:
    """What was found of a key so far."""

    def __init__(self) -> None:
        self.members: list[str] = []
        self.image: tuple[str, tuple[int, ...]] | None = None
        self.label: bytes | None = None


def key_of(name: str) -> str:
    """Return what the members of a sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def shard_index_of(shard: TarShard, given_up: threading.Event) -> tuple[Entry, ShardIndex]:
    """Return the state of an archive and its samples; reads it if it is new, has changed, or if its state is unknown.

    Raises DataError naming the archive and the member for what is missing, broken or ambiguous, and CancelledError
    once the event is set.
    """
    before = _entry(shard)
    path = memory_file(str(shard), f"shard-{HEADERS}.npz")
    if not before.tag:
        return _found(shard, before, None, given_up)
    recalled = _recalled(path, before)
    if recalled is None:
        with turn(path, given_up):
            recalled = _recalled(path, before)
            if recalled is None:
                return _found(shard, before, path, given_up)
    return before, recalled


def _recalled(path: Path | None, entry: Entry) -> ShardIndex | None:
    found = recall(path, _digest(entry))
    if found is None:
        return None
    places = Places(*(found[name] for name in Places._fields))
    texts = PackedIds.of_arrays(found["label_text"], found["label_ends"])
    labels = [None, *(text.encode(errors="surrogateescape") for text in texts)]
    return ShardIndex(PackedIds.of_arrays(found["id_text"], found["id_ends"]), places, labels, found["label_of"])


def _found(shard: TarShard, before: Entry, path: Path | None, given_up: threading.Event) -> tuple[Entry, ShardIndex]:
    """Read an archive, and keep what was found if it certainly is of that state."""
    with _reading:
        index = _read(shard, before.size, given_up)
    after = _entry(shard)
    if differ(before, after):
        raise DataError(f"shard '{shard}' changed while it was read.\n  Fix: run again once it is written.")
    if before == after:
        texts = PackedIds(text.decode(errors="surrogateescape") for text in index.labels if text is not None)
        arrays = {"id_text": index.ids.text, "id_ends": index.ids.ends, "label_of": index.label_of}
        arrays |= {"label_text": texts.text, "label_ends": texts.ends} | index.places._asdict()
        remember_scan(path, _digest(before), arrays)
    return after, index


def _digest(entry: Entry) -> bytes:
    return hashlib.sha256(f"{entry.size} {entry.tag}".encode()).digest()


def differ(one: Entry, other: Entry) -> bool:
    """Return whether two states are surely of different contents."""
    return one.size != other.size or (one.tag != other.tag and bool(one.tag and other.tag))


def _read(shard: TarShard, size: int, given_up: threading.Event) -> ShardIndex:
    samples: dict[str, _Sample] = {}
    try:
        with shard.opened(size) as file:
            for member in members(file, lambda name: _is_wanted(_plain(name), shard)):
                if given_up.is_set():
                    raise CancelledError
                name = _plain(member.name)
                if name:
                    _add(samples.setdefault(key_of(name), _Sample()), name, member, shard)
    except LogitCacheError:
        raise
    except (OSError, ValueError) as cause:
        raise _unreadable(shard, cause) from cause
    return _complete(shard, samples)


def _complete(shard: TarShard, samples: Mapping[str, _Sample]) -> ShardIndex:
    """Put samples together; raises DataError if there is none, or one without an image."""
    if not samples:
        raise DataError(
            f"shard '{shard}' holds no samples.\n  Fix: put images into it ({extension_names()}), or leave it out."
        )
    places = []
    for key, sample in samples.items():
        if sample.image is None:
            raise DataError(
                f"sample '{key}' of shard '{shard}' has no image, but {some(sample.members)}: what shares a name up to "
                f"the first dot is a sample.\n  Fix: give it one ({extension_names()}), or take it out."
            )
        places.append(sample.image[1])
    starts, lengths, digests, *heads = zip(*places, strict=True)
    columns = Places(
        narrowed(np.array(starts)),
        narrowed(np.array(lengths)),
        np.array(digests, np.uint64),
        narrowed(np.array(heads).T),
    )
    texts: dict[bytes | None, int] = {None: 0}
    label_of = np.array([texts.setdefault(sample.label, len(texts)) for sample in samples.values()])
    return ShardIndex(PackedIds(samples), columns, list(texts), narrowed(label_of))


def _plain(name: str) -> str:
    """Return a member's path below the top of its archive; "" for what is hidden or has no extension."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    hidden = any(part[0] == "." for part in parts)
    return "" if not parts or hidden or "." not in parts[-1] else "/".join(parts)


def _extension(name: str) -> str:
    return name[len(key_of(name)) :].lower()


def _is_wanted(name: str, shard: TarShard) -> bool:
    return _extension(name) == LABEL or is_read(_extension(name), _shown(name, shard))


def _add(sample: _Sample, name: str, member: TarMember, shard: TarShard) -> None:
    """Note a member of a sample; raises DataError if there is one like it already, or one that is no image."""
    sample.members.append(name)
    if not _is_wanted(name, shard):
        return
    if _extension(name) == LABEL:
        if sample.label is not None:
            raise _ambiguous(shard, key_of(name), "labels", [name, name])
        sample.label = member.data
    else:
        if sample.image is not None:
            raise _ambiguous(shard, key_of(name), "images", [sample.image[0], name])
        digest = digest_of(member.data)
        head = head_of(io.BytesIO(member.data), _shown(name, shard))
        sample.image = name, (member.start, len(member.data), digest, *head)


def _shown(name: str, shard: TarShard) -> str:
    return f"{name}' in '{shard}"


def _ambiguous(shard: TarShard, key: str, what: str, names: list[str]) -> DataError:
    return DataError(
        f"sample '{key}' of shard '{shard}' has two {what}: {some(names)}.\n"
        "  Fix: leave one of them, or give the other a name that differs before the first dot."
    )


def _entry(shard: TarShard) -> Entry:
    try:
        return shard.entry()
    except OSError as cause:
        raise _unreadable(shard, cause) from cause


def _unreadable(shard: TarShard, cause: Exception) -> DataError:
    reason = str(cause)
    fix = "write it again; archives are not compressed."
    if isinstance(cause, OSError):
        reason = cause.strerror or "it is not there"
        fix = "correct shards, or put it back and make it readable."
    return DataError(f"shard '{shard}' cannot be read: {reason}.\n  Fix: {fix}")
