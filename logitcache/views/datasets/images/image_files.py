"""Image files: which are read, how their bytes become pixels, and what their heads hold.

Pixels are those of torchvision's ImageFolder, with these differences: 16-bit grey is scaled and not clipped, and GIF is
read (its first frame). The EXIF orientation is ignored, as there, or applied; Pillow itself applies that of TIFF.
"""

import contextlib
import copy
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from pydantic import Field
from torch import Tensor

from logitcache.errors import DataError
from logitcache.runtime.versions import versions
from logitcache.views.datasets.images.pixels import Mode, from_pil

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
)

# Silently skipping such files would change the data set without an error.
_OTHER_IMAGES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".exr", ".hdr"),
    *(".dng", ".cr2", ".nef", ".arw", ".dcm", ".jpg_large"),
)

# Others would run other decoders, one of them an interpreter of PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")

_SHOWN = 3

Orientation = Annotated[
    Literal["ignore", "apply"],
    Field(
        description="Handling of the EXIF orientation: `ignore` keeps pixels as they are stored, as torchvision does; "
        "`apply` rotates them. A cache keeps its setting."
    ),
]
Decoder = Annotated[
    Literal["pillow"],
    Field(description="Library that decodes files; the cache records its version."),
]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_UPRIGHT, _SWAPPED = 1, 5
"""The orientation of what is stored as it is to be seen, and the first of those that swap height and width."""

_REDUCIBLE = 16

HEADERS = f"headers-pillow-{PIL.__version__}"
"""Names what is remembered of headers."""

Factors = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""From sizes of images [B, 2] to 1, 2, 4 or 8, [B]: images are decoded at 1/factor of them."""


class ImageHeader(NamedTuple):
    """The header of a file: height and width of what is stored, and its traits.

    These are the EXIF orientation, 1 without any, and 16 more if the decoder can reduce the image.
    """

    height: int
    width: int
    traits: int


def decode(
    file: BinaryIO, mode: Mode, name: str, orientation: Orientation = "ignore", factors: Factors | None = None
) -> Tensor:
    """Return uint8 [C, H, W]; raises DataError naming a file that cannot be decoded."""
    with _refused(name), Image.open(file, formats=_FORMATS) as image:
        turn = _TURNS.get(_orientation(image)) if orientation == "apply" else None
        if factors is not None:
            _, (factor,) = _sizes_and_factors(np.array([_header(image)]), orientation, factors)
            if factor > 1:  # libjpeg leaves frequencies out
                image.draft(None, (image.width // factor, image.height // factor))
        return from_pil(image if turn is None else image.transpose(turn), mode)


def head_of(file: BinaryIO, name: str) -> ImageHeader:
    """Read the header of a file; raises DataError naming one that has none."""
    with _refused(name), Image.open(file, formats=_FORMATS) as image:
        return _header(image)


def _header(image: Image.Image) -> ImageHeader:
    # Lossless JPEG, which has no tables of quantization, cannot be reduced.
    reducible = isinstance(image, JpegImageFile) and bool(image.quantization)
    return ImageHeader(image.height, image.width, _orientation(image) + _REDUCIBLE * reducible)


def _sizes_and_factors(
    heads: NDArray[np.int64], orientation: Orientation, factors: Factors | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heights and widths of decoded images [n, 2], and the factors by which they are reduced, [n]."""
    sizes, traits = heads[:, :2], heads[:, 2]
    if orientation == "apply":
        sizes = np.where(traits[:, None] % _REDUCIBLE >= _SWAPPED, heads[:, 1::-1], sizes)
    if factors is None:
        return sizes, np.ones(len(heads), np.int64)
    found = np.where(traits >= _REDUCIBLE, factors(sizes), 1)
    return -(-sizes // found[:, None]), found


class ImageFiles(ABC):
    """A data set whose images are files: sizes and orientations come from their headers."""

    ids: Sequence[str]

    def __init__(self, mode: Mode, orientation: Orientation) -> None:
        self._mode, self.orientation = mode, orientation
        self._factors: Factors | None = None

    @abstractmethod
    def contents(self, indices: Sequence[int]) -> Iterable[bytes]:
        """Read several files; raises DataError naming one that cannot be read or is not what it was."""

    @abstractmethod
    def shown(self, index: int) -> str:
        """Name a file for messages."""

    @abstractmethod
    def digests(self) -> NDArray[np.uint64]:
        """Return the digest of every file, [n]."""

    @abstractmethod
    def heads(self) -> NDArray[np.int64]:
        """Return the header of every file, [n, 3]."""

    def head(self, index: int) -> NDArray[np.int64]:
        """Return the header of one file, [3]."""
        return np.asarray(self.heads()[index])

    def sizes(self) -> NDArray[np.int64]:
        """Return height and width of all images, [n, 2], as `read` gives them."""
        return self.sizes_of(self.heads())

    def sizes_of(self, heads: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return height and width of the images with these headers, [B, 2], as `read` gives them."""
        return _sizes_and_factors(heads, self.orientation, self._factors)[0]

    def turned(self) -> NDArray[np.int64]:
        """Return which images have an EXIF orientation that is ignored."""
        ignored = self.orientation == "ignore"
        return np.flatnonzero(self.heads()[:, 2] % _REDUCIBLE > _UPRIGHT) if ignored else np.empty(0, np.int64)

    def reduced(self, factors: Factors) -> Self:
        """Return the same images, of which JPEG is decoded at 1/`factors` of its sizes."""
        if not self.is_scanned:
            self.heads()  # both use one scan
        images = copy.copy(self)
        images._factors = factors
        return images

    @property
    def is_scanned(self) -> bool:
        """Whether headers and digests are known, or are remembered apart from this object."""
        return True

    @property
    def num_channels(self) -> int:
        """Channels of the decoded images."""
        return 1 if self._mode == "L" else 3

    def about_bytes(self) -> int:
        """Estimate the bytes of all decoded images by the first, without a look at each file."""
        height, width = self.sizes_of(self.head(0)[None])[0].tolist()
        return len(self.ids) * int(height * width) * self.num_channels

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises DataError naming a file that cannot be read or decoded."""
        return self.read_batch([index])[0]

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several images, read together if that is faster."""
        return list(map(self.decoded, self.contents(indices), indices))

    def decoded(self, content: bytes, index: int) -> Tensor:
        """Decode a file to uint8 [C, H, W]; raises DataError naming one that cannot be decoded."""
        return decode(io.BytesIO(content), self._mode, self.shown(index), self.orientation, self._factors)

    def described(self) -> str:
        """Return what decides the pixels beside the files: the libraries and the options."""
        return f"{versions()} {self._mode} {self.orientation}"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image of which only the head was read."""
    # Pillow applies that of TIFF itself, and would decode a PNG to look behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return _UPRIGHT
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # broken EXIF makes Pillow raise anything; the pixels may be sound
        return _UPRIGHT
    return found if found in _TURNS else _UPRIGHT


def is_image(path: str) -> bool:
    """Return whether a file's name is that of an image; raises DataError for a type of image that is not read."""
    return is_read(os.path.splitext(path)[1], path)


def is_read(extension: str, path: str) -> bool:
    """Return whether an extension is that of an image; raises DataError for a type of image that is not read."""
    if extension.lower() in _OTHER_IMAGES:
        raise DataError(
            f"'{path}' is an image of a type that is not read.\n"
            f"  Fix: convert it ({extension_names()}), or move it away."
        )
    return extension.lower() in EXTENSIONS


def some(names: Sequence[str]) -> str:
    """Quote the first few names."""
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def extension_names() -> str:
    """List the extensions that are read."""
    return " ".join(EXTENSIONS)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn what a decoder raises into a DataError that names the file."""
    try:
        yield
    except Exception as cause:  # broken bytes make decoders raise anything
        reason = "cannot identify its format" if isinstance(cause, UnidentifiedImageError) else str(cause)
        fix = "replace it or remove it."
        if isinstance(cause, Image.DecompressionBombError):
            fix = "scale it down; Pillow takes an image of so many pixels for an attack."
        raise DataError(f"image '{name}' cannot be read: {reason}.\n  Fix: {fix}") from cause
