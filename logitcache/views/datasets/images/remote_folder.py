"""Remote folder: the images of a folder at a URL, with the ids, order and fingerprint of the same folder on a disk."""

import contextlib
import io
import itertools
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import DataError, RecipeError, RemoteError
from logitcache.runtime.console import track
from logitcache.store import digest_index
from logitcache.store.file_locks import turn
from logitcache.store.files import memory_file, read_memory, write_memory
from logitcache.store.remote.client import Entry, Remote
from logitcache.views.datasets.base import digest_of
from logitcache.views.datasets.images.class_folders import Listing, by_class, unlabelled
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.datasets.images.image_files import HEADERS, ImageFiles, Orientation, head_of, is_image
from logitcache.views.datasets.images.pixels import Mode

_BLOCK = 1024  # files whose results are awaited together


_MEASURED = struct.Struct("<Q3q")  # digest, height, width, traits: as long as the digests of a stamp index


def open_remote_folder(
    remote: Remote,
    mode: Mode,
    labelled: bool | None,
    orientation: Orientation,
    chosen: Callable[[Listing], Listing],
) -> "RemoteImages":
    """List the files below a URL, and keep the `chosen`.

    Raises DataError for a folder that is missing, empty or ambiguous.
    """
    if not remote.is_listable:
        raise RecipeError(
            f"'{remote}' cannot be listed, as a web server only hands out what is named.\n"
            "  Fix: name shards, {kind: webdataset, shards: …}, or copy the folder to this machine."
        )
    entries = remote.list()
    if "" in entries:
        raise DataError(f"the image folder '{remote}' is a file, not a folder.\n  Fix: correct root.")
    images, folders = _below(remote.url, entries)
    if labelled is False:
        return RemoteImages(remote, mode, chosen(unlabelled(remote.url, PackedIds(images))), entries, orientation)
    loose = [name for name in images if "/" not in name]
    classes: dict[str, list[str]] = {folder: [] for folder in sorted(folders)}
    for name in images[len(loose) :]:
        classes[name.partition("/")[0]].append(name)
    listing = by_class(remote.url, loose, list(classes), [PackedIds(names) for names in classes.values()], labelled)
    return RemoteImages(remote, mode, chosen(listing), entries, orientation)


def _below(root: str, keys: Mapping[str, Entry]) -> tuple[list[str], set[str]]:
    """Return the images that are not hidden, folder by folder, and the names of the first level of folders."""
    # A key that ends with "/" marks a folder; consoles of object storage make them.
    seen = [key for key in keys if not key.endswith("/") and not any(part[:1] == "." for part in key.split("/"))]
    images = [key for key in seen if is_image(f"{root}/{key}")]
    images.sort(key=lambda key: key.rpartition("/")[::2])
    return images, {key.partition("/")[0] for key in seen if "/" in key}


class RemoteImages(ImageFiles):
    """Image files at a URL in order; an id is the path below the root."""

    def __init__(
        self, remote: Remote, mode: Mode, listing: Listing, entries: Mapping[str, Entry], orientation: Orientation
    ) -> None:
        self.ids, self.labels, self.class_names = listing
        self.num_classes = len(self.class_names) if self.class_names else None
        super().__init__(mode, orientation)
        self._remote = remote
        self._lengths = np.array([entries[name].size for name in self.ids], np.int64)
        self._tags: list[str] | None = [entries[name].tag for name in self.ids]
        self._measured: NDArray[np.int64] | None = None

    def contents(self, indices: Sequence[int]) -> Iterable[bytes]:
        """Fetch files at the same time; raises DataError naming one that is not what was listed."""
        return self._remote.each(self._content, indices)

    @property
    def is_scanned(self) -> bool:
        """Whether every file has been read."""
        return self._measured is not None

    def heads(self) -> NDArray[np.int64]:
        """Return the heads of all files [n, 3]."""
        return self._scan()[:, 1:]

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all files [n]."""
        return self._scan()[:, 0].view(np.uint64)

    def _scan(self) -> NDArray[np.int64]:
        """Return digest, height, width and orientation of every file, [n, 4]; read are those without a known tag."""
        if self._measured is None:
            assert self._tags is not None
            stamps = map(digest_index.stamp_of_tag, self._lengths.tolist(), self._tags)
            names = (f"{self._remote}/{name}" for name in self.ids)
            rows = digest_index.as_rows(map(digest_index.packed_row, names, stamps))
            path = memory_file(self._remote.url, f"remote-{HEADERS}")
            if not _recalled(path, rows).all():
                with turn(path, threading.Event()):
                    self._scan_rest(path, rows)
            self._measured = np.ascontiguousarray(rows["digest"]).view("<i8").astype(np.int64)
            self._tags = None  # they are large and of no more use
        return self._measured

    def _scan_rest(self, path: Path | None, rows: digest_index.StampRows) -> None:
        """Fill in the rows that no other process has remembered by now; an interrupted pass is remembered too."""
        known = _recalled(path, rows)
        todo = np.flatnonzero(~known).tolist()
        measured: list[bytes] = []
        try:
            blocks = (todo[start : start + _BLOCK] for start in range(0, len(todo), _BLOCK))
            found = itertools.chain.from_iterable(self._remote.each(self._measure, block) for block in blocks)
            measured.extend(track(found, f"reading {self._remote}", len(todo)))
        finally:
            done = todo[: len(measured)]
            rows["digest"][done] = np.frombuffer(b"".join(measured), np.uint8).reshape(-1, _MEASURED.size)
            known[done] = True
            if done:
                write_memory(path, digest_index.StampIndex(read_memory(path) or b"").merged(rows[known]))

    def _measure(self, index: int) -> bytes:
        data = self._stored(index)
        digest = digest_of(data)
        return _MEASURED.pack(digest, *head_of(io.BytesIO(data), self.shown(index)))

    def _content(self, index: int) -> bytes:
        """Fetch a file; of one whose digest is known every byte is compared."""
        data = self._stored(index)
        if self._measured is not None and digest_of(data) != self.digests()[index]:
            raise self._changed(index, "other bytes")
        return data

    def _stored(self, index: int) -> bytes:
        name, length = self.ids[index], int(self._lengths[index])
        try:
            return self._remote.read_range(name, 0, length)
        except FileNotFoundError as cause:
            raise DataError(
                f"image '{self.shown(index)}' cannot be read: it is not there any more.\n"
                "  Fix: put it back; the folder must not change during a run."
            ) from cause
        except RemoteError as error:
            with contextlib.suppress(RemoteError):  # the first error explains more
                now = self._remote.entry(name).size
                if now != length:
                    raise self._changed(index, f"{now} bytes where {length} were listed") from error
            raise

    def _changed(self, index: int, how: str) -> DataError:
        return DataError(
            f"image '{self.shown(index)}' has changed since the folder was opened: {how}.\n"
            "  Fix: put it back; the folder must not change during a run."
        )

    def shown(self, index: int) -> str:
        """Return the URL."""
        return f"{self._remote}/{self.ids[index]}"


def _recalled(path: Path | None, rows: digest_index.StampRows) -> NDArray[np.bool_]:
    """Fill in the remembered digests and heads; returns of which rows they were remembered."""
    return digest_index.StampIndex(read_memory(path) or b"").fill(rows)
