"""Remote folder: the images of a folder at a URL, with the ids, order and fingerprint of the same folder on a disk."""

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import DataError, RecipeError, RemoteError
from logitcache.store.remote.client import Entry, Remote
from logitcache.views.datasets.base import first_word
from logitcache.views.datasets.images.class_folders import Listing, by_class, unlabelled
from logitcache.views.datasets.images.ids import PackedIds
from logitcache.views.datasets.images.image_files import Orientation, decode, head_of, is_image, sizes_of, turned
from logitcache.views.datasets.images.pixels import Mode
from logitcache.views.datasets.images.remote_memory import Found, RemoteMemory


def open_folder(remote: Remote, mode: Mode, labelled: bool | None, orientation: Orientation) -> "RemoteImages":
    """List the files below a URL; raises DataError for a folder that is missing, empty or ambiguous."""
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
        return RemoteImages(remote, mode, unlabelled(remote.url, PackedIds(images)), entries, orientation)
    loose = [name for name in images if "/" not in name]
    classes: dict[str, list[str]] = {folder: [] for folder in sorted(folders)}
    for name in images[len(loose) :]:
        classes[name.partition("/")[0]].append(name)
    listing = by_class(remote.url, loose, list(classes), [PackedIds(names) for names in classes.values()], labelled)
    return RemoteImages(remote, mode, listing, entries, orientation)


def _below(root: str, keys: Mapping[str, Entry]) -> tuple[list[str], set[str]]:
    """Return the images that are not hidden, folder by folder, and the names of the first level of folders."""
    # A key that ends with "/" marks a folder; consoles of object storage make them.
    seen = [key for key in keys if not key.endswith("/") and not any(part[:1] == "." for part in key.split("/"))]
    images = [key for key in seen if is_image(f"{root}/{key}")]
    images.sort(key=lambda key: key.rpartition("/")[::2])
    return images, {key.partition("/")[0] for key in seen if "/" in key}


class RemoteImages:
    """Image files at a URL in order; an id is the path below the root."""

    def __init__(
        self, remote: Remote, mode: Mode, listing: Listing, entries: Mapping[str, Entry], orientation: Orientation
    ) -> None:
        self.ids, self.labels, self.class_names = listing
        self.num_classes = len(self.class_names) if self.class_names else None
        self._remote = remote
        self._mode, self._orientation = mode, orientation
        self._lengths = np.array([entries[name].size for name in self.ids], np.int64)
        self._tags: list[str] | None = [entries[name].tag for name in self.ids]
        self._found: Found | None = None

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises DataError naming a file that is not what was listed, or cannot be decoded."""
        return self.read_batch([index])[0]

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several images, fetched at the same time."""
        contents = zip(indices, self._remote.each(self._content, indices), strict=True)
        return [decode(io.BytesIO(data), self._mode, self._shown(at), self._orientation) for at, data in contents]

    def sizes(self) -> NDArray[np.int64]:
        """Return the heights and widths of all images [n, 2]."""
        return sizes_of(self._scan().heads, self._orientation)

    def turned(self) -> NDArray[np.int64]:
        """Return which images have an EXIF orientation that is ignored."""
        return turned(self._scan().heads, self._orientation)

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all files [n]."""
        return self._scan().digests

    def _scan(self) -> Found:
        """Read every file once that is not remembered, for digests and sizes both."""
        if self._found is None:
            assert self._tags is not None
            entries = list(map(Entry, self._lengths.tolist(), self._tags))
            self._found = RemoteMemory(self._remote, self.ids).found(entries, self._measure)
            self._tags = None  # they are large and of no more use
        return self._found

    def _measure(self, index: int) -> tuple[int, ...]:
        """Return digest, height, width and orientation of a file."""
        data = self._stored(index)
        return first_word(hashlib.sha256(data).digest()), *head_of(io.BytesIO(data), self._shown(index))

    def _content(self, index: int) -> bytes:
        """Fetch a file; of one whose digest is known every byte is compared."""
        data = self._stored(index)
        if self._found and first_word(hashlib.sha256(data).digest()) != self._found.digests[index]:
            raise self._changed(index, "other bytes")
        return data

    def _stored(self, index: int) -> bytes:
        name, length = self.ids[index], int(self._lengths[index])
        try:
            return self._remote.read_range(name, 0, length)
        except FileNotFoundError as cause:
            raise DataError(
                f"image '{self._shown(index)}' cannot be read: it is not there any more.\n"
                "  Fix: put it back; the folder must not change during a run."
            ) from cause
        except RemoteError as error:
            with contextlib.suppress(RemoteError):  # what went wrong first says more
                now = self._remote.entry(name).size
                if now != length:
                    raise self._changed(index, f"{now} bytes where {length} were listed") from error
            raise

    def _changed(self, index: int, how: str) -> DataError:
        return DataError(
            f"image '{self._shown(index)}' has changed since the folder was opened: {how}.\n"
            "  Fix: put it back; the folder must not change during a run."
        )

    def _shown(self, index: int) -> str:
        return f"{self._remote}/{self.ids[index]}"
