"""Image folder: files below one folder, whose first level of folders may name the classes.

Order, classes and pixels are those of torchvision's ImageFolder, with these differences: hidden
files and folders are left out, 16-bit grey is scaled and not clipped, and GIF is read (its first
frame). The EXIF orientation is not applied, as there.
"""

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from logitcache.errors import DataError
from logitcache.files import Measure, file_digests, remembered
from logitcache.recipe import Component
from logitcache.views.datasets.base import UNLABELLED, as_digests, first_word
from logitcache.views.datasets.ids import PackedIds
from logitcache.views.datasets.pixels import Mode, from_pil

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
)
# Left unread these would be missed by nobody until the results are in.
_OTHER_IMAGES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".exr", ".hdr"),
    *(".dng", ".cr2", ".nef", ".arw", ".dcm", ".jpg_large"),
)
# Others would run other decoders, one of them an interpreter of PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_SHOWN = 3

Image.init()  # formats can be named only once every plugin is there


class ImageFolder(Component):
    """Images of a folder: JPEG, PNG, WebP, BMP, TIFF, PPM, GIF.

    `labelled`: the folders directly below `root` are the classes, in order of their names. Images
    right in `root` with no class folders beside them have no labels. With `labelled: false` every
    image below `root` is taken, without a label. `decoder`: what turns files into pixels, at full resolution and
    without applying the EXIF orientation; it is part of the stored form because decoders differ.
    """

    kind: Literal["image_folder"] = "image_folder"
    root: str
    mode: Mode = "RGB"
    labelled: bool = True
    decoder: Literal["pillow"] = "pillow"

    def open(self) -> "FolderImages":
        """List the files; raises DataError for a folder that is missing, empty or ambiguous."""
        root = Path(self.root).expanduser().absolute()
        if not root.is_dir():
            state = "is a file, not a folder" if root.exists() else "does not exist"
            raise DataError(f"the image folder '{root}' {state}.\n  Fix: correct root.")
        if not self.labelled:
            return _unlabelled(root, self.mode, _images_below(root, ""))
        return _by_class(root, self.mode)


class FolderImages:
    """Image files in order; an id is the path below the root, with forward slashes."""

    def __init__(
        self,
        root: Path,
        mode: Mode,
        ids: PackedIds,
        labels: NDArray[np.int64],
        class_names: tuple[str, ...] | None,
    ) -> None:
        self.ids = ids
        self.labels = labels
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else None
        self._root = root
        self._mode = mode

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises DataError naming a file that cannot be decoded."""
        path = self._path(self.ids[index])
        with _refused(path), open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            return from_pil(image, self._mode)

    def sizes(self) -> NDArray[np.int64]:
        """Return the heights and widths of all images [n, 2], from the heads of those files that changed."""
        found = remembered([self._path(name) for name in self.ids], _SIZES, what="image")
        return np.frombuffer(b"".join(found), "<i8").reshape(len(found), -1)[:, :2].astype(np.int64)

    def digests(self) -> NDArray[np.uint64]:
        """Return the digests of all files [n]; only those that changed are read again."""
        found = file_digests([self._path(name) for name in self.ids], what="image")
        return as_digests(first_word(digest) for digest in found)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _refused(path: str) -> Iterator[None]:
    """Turn what a decoder raises into a DataError that names the file."""
    try:
        yield
    except Exception as cause:  # broken bytes make decoders raise anything
        raise DataError(_why_unreadable(path, cause)) from cause


def _size(file: BinaryIO) -> bytes:
    """Read the head of an image file: height and width, 16 bytes."""
    with _refused(file.name), Image.open(file, formats=_FORMATS) as image:
        return struct.pack("<2q", image.height, image.width)


_SIZES = Measure(f"pillow-{PIL.__version__}-sizes", "reading the sizes of", _size)


def _by_class(root: Path, mode: Mode) -> FolderImages:
    entries = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
    loose = [name for name in entries if _is_image(os.path.join(root, name)) and (root / name).is_file()]
    classes = [name for name in entries if (root / name).is_dir()]
    images = [_images_below(root, name) for name in classes]
    if loose and not any(images):
        return _unlabelled(root, mode, loose)
    if loose:
        raise DataError(
            f"'{root}' holds both class folders ('{classes[0]}') and images of no class "
            f"({_some(loose)}).\n  Fix: move the images into class folders or away, or set "
            "labelled: false to take every image without a label."
        )
    _check_classes(root, classes, images)
    counts = [len(files) for files in images]
    return FolderImages(
        root,
        mode,
        PackedIds(itertools.chain.from_iterable(images)),
        np.repeat(np.arange(len(classes), dtype=np.int64), counts),
        tuple(classes),
    )


def _unlabelled(root: Path, mode: Mode, files: list[str]) -> FolderImages:
    if not files:
        raise DataError(_why_no_images(root))
    return FolderImages(root, mode, PackedIds(files), np.full(len(files), UNLABELLED, np.int64), None)


def _check_classes(root: Path, classes: list[str], images: list[list[str]]) -> None:
    if not any(images):
        raise DataError(_why_no_images(root))
    empty = [name for name, files in zip(classes, images, strict=True) if not files]
    if empty:
        raise DataError(
            f"class folders without an image in '{root}': {_some(empty)}.\n"
            f"  Fix: remove them, or add images ({_known()})."
        )
    if {name.lower() for name in classes} <= _SPLITS:
        raise DataError(
            f"'{root}' holds splits ({_some(classes)}), which would become the classes.\n"
            f"  Fix: set root: {root / classes[0]}, or labelled: false to take every image."
        )


def _images_below(root: Path, folder: str) -> list[str]:
    """Return the paths of the images in a folder and its folders, relative to the root."""
    top = os.path.join(root, folder) if folder else str(root)
    found = []
    for parent, names in sorted(_walk(top)):
        inside = os.path.relpath(parent, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        found += [prefix + name for name in names if _is_image(os.path.join(parent, name))]
    return found


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with its file names, neither hidden, links followed as torchvision does."""
    for parent, folders, names in os.walk(top, followlinks=True, onerror=_unreadable_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _check_link(os.path.join(parent, name))
        yield parent, sorted(name for name in names if not name.startswith("."))


def _check_link(folder: str) -> None:
    if os.path.islink(folder):
        target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
        if os.path.commonpath([target, place]) == target:
            raise DataError(f"the link '{folder}' leads back to '{target}', which holds it.\n  Fix: remove the link.")


def _unreadable_folder(cause: OSError) -> None:
    raise DataError(
        f"the folder '{cause.filename}' cannot be read: {cause.strerror}.\n  Fix: make it readable, or move it away."
    ) from cause


def _is_image(path: str) -> bool:
    extension = os.path.splitext(path)[1].lower()
    if extension in _OTHER_IMAGES:
        raise DataError(
            f"'{path}' is an image of a type that is not read.\n  Fix: convert it ({_known()}), or move it away."
        )
    return extension in EXTENSIONS


def _why_no_images(root: Path) -> str:
    return f"there are no images in '{root}'.\n  Fix: correct root, or add images ({_known()})."


def _why_unreadable(path: str, cause: Exception) -> str:
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    if not os.path.lexists(path):
        fix = "put it back; the folder must not change during a run."
    elif isinstance(cause, Image.DecompressionBombError):
        fix = "scale it down; Pillow takes an image of so many pixels for an attack."
    else:
        fix = "replace it or remove it; nothing is skipped."
    return f"image '{path}' cannot be read: {reason}.\n  Fix: {fix}"


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _known() -> str:
    return " ".join(EXTENSIONS)
