"""Image files: which are read, and how their bytes become pixels.

Pixels are those of torchvision's ImageFolder, with these differences: 16-bit grey is scaled and not clipped, and GIF is
read (its first frame). The EXIF orientation is not applied, as there.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from logitcache.errors import DataError
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
_SHOWN = 3

Image.init()  # formats can be named only once every plugin is there


def decode(file: BinaryIO, mode: Mode, name: str) -> Tensor:
    """Return uint8 [C, H, W]; raises DataError naming a file that cannot be decoded."""
    with _refused(name), Image.open(file, formats=_FORMATS) as image:
        return from_pil(image, mode)


def size_of(file: BinaryIO, name: str) -> tuple[int, int]:
    """Return height and width from the head of a file; raises DataError naming one that has none."""
    with _refused(name), Image.open(file, formats=_FORMATS) as image:
        return image.height, image.width


def is_image(path: str) -> bool:
    """Say whether a file's name is that of an image; raises DataError for a type of image that is not read."""
    return is_read(os.path.splitext(path)[1], path)


def is_read(extension: str, path: str) -> bool:
    """Say whether an extension is that of an image; raises DataError for a type of image that is not read."""
    if extension.lower() in _OTHER_IMAGES:
        raise DataError(
            f"'{path}' is an image of a type that is not read.\n  Fix: convert it ({known()}), or move it away."
        )
    return extension.lower() in EXTENSIONS


def some(names: Sequence[str]) -> str:
    """Quote the first few names."""
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def known() -> str:
    """List the extensions that are read."""
    return " ".join(EXTENSIONS)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn what a decoder raises into a DataError that names the file."""
    try:
        yield
    except Exception as cause:  # broken bytes make decoders raise anything
        reason = "cannot identify its format" if isinstance(cause, UnidentifiedImageError) else str(cause)
        fix = "replace it or remove it; nothing is skipped."
        if isinstance(cause, Image.DecompressionBombError):
            fix = "scale it down; Pillow takes an image of so many pixels for an attack."
        raise DataError(f"image '{name}' cannot be read: {reason}.\n  Fix: {fix}") from cause
