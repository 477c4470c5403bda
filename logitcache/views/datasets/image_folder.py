"""Image folder: files below one folder, whose first level of folders may name the classes."""

import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from logitcache.errors import DataError, RefusedError
from logitcache.store.digest_index import SHA256, Measure, remembered
from logitcache.store.remote.client import Remote, is_remote
from logitcache.store.safe_files import open_regular
from logitcache.views.datasets.base import DatasetBase
from logitcache.views.datasets.images.class_folders import Listing, Split, by_class, of_split, unlabelled
from logitcache.views.datasets.images.ids import PackedIds, PathsBelow
from logitcache.views.datasets.images.image_files import HEADERS, Decoder, ImageFiles, Orientation, head_of, is_image
from logitcache.views.datasets.images.pixels import Mode
from logitcache.views.datasets.images.remote_folder import RemoteImages, open_remote_folder

_OTHERS_PER_IMAGE, _MOST_OTHERS = 10, 50_000
"""Files and folders looked at for each image that a manifest records, and besides."""

LARGEST = 1 << 30  # bytes of an image file: Pillow refuses one of so many pixels


class ImageFolder(DatasetBase):
    """Images in a folder, on disk or at a URL that can be listed: JPEG, PNG, WebP, BMP, TIFF, PPM, GIF.

    A folder and its copy at a URL are one data set: the same ids, order, classes and fingerprint. Images are decoded by
    Pillow, at full resolution unless views have `decode: scaled`, and converted as by torchvision's ImageFolder: grey
    and palette images become RGB, transparency is dropped, CMYK is converted; 16-bit grey is reduced to its high byte,
    floating-point images are refused. File names are compared byte by byte: a copy whose names have another Unicode
    normalisation is refused.
    """

    added: ClassVar[frozenset[str]] = frozenset({"orientation", "split", "holdout"})

    kind: Literal["image_folder"] = "image_folder"
    root: str = Field(
        description="Folder of the images, `root/class/…/image`: a path, or a URL such as `s3://bucket/train` "
        "without credentials.",
        examples=["photos", "s3://bucket/train"],
    )
    mode: Mode = "RGB"
    labelled: bool | None = Field(
        default=None,
        description="Whether the folders directly below `root` are the classes, in the order of their names. By "
        "default they are if there are any; `true` refuses a folder without them, `false` takes every image below "
        "`root`, without labels.",
        examples=[True, False],
    )
    decoder: Decoder = "pillow"
    orientation: Orientation = "ignore"
    split: Split | None = Field(
        default=None,
        description="Part of the images: `validation` is every `holdout`-th image in order, `train` the others. By "
        "default all images.",
        examples=["train", "validation"],
    )
    holdout: Annotated[int, Field(ge=2)] = Field(
        default=10, description="Distance of the images, in order, that belong to `split: validation`."
    )

    def idle(self, epochs: float) -> str | None:
        """Return why nothing is held out."""
        if "holdout" in self.model_fields_set and self.split is None:
            return f"has holdout {self.holdout} and no split. Fix: split: train, or leave it out"
        return None

    def risks(self) -> tuple[str, ...]:
        """Name a root at a URL; of a folder here only regular files are read, by decoders that run no code."""
        return (f"images at '{self.root}'",) if is_remote(self.root) else ()

    def open(self, num_images: int | None = None) -> "FolderImages | RemoteImages":
        """List the files; raises DataError for a folder that is missing, empty or ambiguous.

        `num_images`, if a manifest names the folder, bounds what is looked at: RefusedError if far more lies there.
        """
        if is_remote(self.root):
            return open_remote_folder(Remote(self.root), self.mode, self.labelled, self.orientation, self._chosen)
        root = Path(self.root).expanduser().absolute()
        if not root.is_dir():
            state = "is a file, not a folder" if root.exists() else "does not exist"
            raise DataError(f"the image folder '{root}' {state}.\n  Fix: correct root.")
        walk = _Walk(root, math.inf if num_images is None else _OTHERS_PER_IMAGE * num_images + _MOST_OTHERS)
        if self.labelled is False:
            return self._images(root, unlabelled(str(root), walk.images()))
        entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
        loose = [name for name in entries if is_image(os.path.join(root, name)) and (root / name).is_file()]
        classes = [name for name in entries if (root / name).is_dir()]
        images = [walk.images(name) for name in classes]
        return self._images(root, by_class(str(root), loose, classes, images, self.labelled))

    def _images(self, root: Path, listing: Listing) -> "FolderImages":
        return FolderImages(root, self.mode, self._chosen(listing), self.orientation)

    @property
    def _chosen(self) -> Callable[[Listing], Listing]:
        return partial(of_split, self.root, split=self.split, holdout=self.holdout)


class FolderImages(ImageFiles):
    """Image files in order; an id is the path below the root, with forward slashes."""

    def __init__(self, root: Path, mode: Mode, listing: Listing, orientation: Orientation) -> None:
        self.ids, self.labels, self.class_names = listing
        self.num_classes = len(self.class_names) if self.class_names else None
        self._paths = PathsBelow(str(root), self.ids)
        super().__init__(mode, orientation)

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Read files one by one; raises DataError naming one that cannot be read."""
        for path in map(self.shown, indices):
            try:
                with open_regular(path) as file:
                    content = _require_small(file).read()
            except OSError as cause:
                moved = "put it back; the folder must not change during a run."
                fix = "make it readable." if os.path.lexists(path) else moved
                raise DataError(f"image '{path}' cannot be read: {cause.strerror or cause}.\n  Fix: {fix}") from cause
            yield content

    def shown(self, index: int) -> str:
        """Return the path."""
        return self._paths[index]

    def head(self, index: int) -> NDArray[np.int64]:
        """Read the header of one file, [3]."""
        path = self.shown(index)
        with open_regular(path) as file:
            return np.array(head_of(file, path))

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all files [n]; only those that changed are read again."""
        found = remembered(self._paths, _SHA256, what="image", width=8)
        return found.view("<u8").astype(np.uint64, copy=False)[:, 0]

    def heads(self) -> NDArray[np.int64]:
        """Return the heads of all files [n, 3]; only those that changed are read again."""
        found = remembered(self._paths, _HEADS, what="image", width=24)
        return found.view("<i8").astype(np.int64, copy=False)


def _require_small(file: BinaryIO) -> BinaryIO:
    """Return an image file; raise DataError for one that would take minutes."""
    if os.fstat(file.fileno()).st_size > LARGEST:
        raise DataError(f"image '{file.name}' has more than {LARGEST} bytes.\n  Fix: replace it or remove it.")
    return file


def _sha256(file: BinaryIO) -> bytes:
    return SHA256.of(_require_small(file))


_SHA256 = SHA256._replace(of=_sha256)
_HEADS = Measure(
    HEADERS,
    "reading the sizes of",
    lambda file: struct.pack("<3q", *head_of(file, file.name)),
)


class _Walk:
    """A walk over the folders below a root, which ends with RefusedError after so many files and folders."""

    def __init__(self, root: Path, most: float) -> None:
        self.root = root
        self._left = most

    def images(self, folder: str = "") -> PackedIds:
        """Return the paths of the images in a folder and its folders, relative to the root.

        None of them is hidden; links are followed as torchvision does.
        """
        found, top = {}, os.path.join(self.root, folder) if folder else str(self.root)
        for parent, folders, names in os.walk(top, followlinks=True, onerror=_unreadable_folder):
            self._left -= len(folders) + len(names)
            if self._left < 0:
                raise RefusedError(
                    f"'{self.root}' holds far more files than the images that the manifest records.\n"
                    "  Fix: if this is the folder, name it yourself: `dataset:` in the recipe, or --set dataset.root=…"
                )
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                _check_link(os.path.join(parent, name))
            inside = os.path.relpath(parent, self.root).replace(os.sep, "/")
            prefix = "" if inside == "." else f"{inside}/"
            shown = (name for name in sorted(names) if not name.startswith("."))
            found[parent] = PackedIds(prefix + name for name in shown if is_image(os.path.join(parent, name)))
        return PackedIds.joined([found[parent] for parent in sorted(found)])


def _check_link(folder: str) -> None:
    if os.path.islink(folder):
        target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
        if os.path.commonpath([target, place]) == target:
            raise DataError(f"the link '{folder}' leads back to '{target}', which holds it.\n  Fix: remove the link.")


def _unreadable_folder(cause: OSError) -> None:
    raise DataError(
        f"the folder '{cause.filename}' cannot be read: {cause.strerror}.\n  Fix: make it readable, or move it away."
    ) from cause
