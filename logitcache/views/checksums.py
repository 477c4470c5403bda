"""Checksums of rendered views: proof, row by row, that a student sees what the teacher saw."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import ReplayMismatchError
from logitcache.views.keys import ViewKey


def row_checksums(images: Tensor) -> NDArray[np.uint32]:
    """Return the CRC-32 of every image's pixels in the order of [C, H, W], for uint8 [B, C, H, W] in any layout."""
    # Image by image: a batch of another layout is never copied as a whole.
    return np.array([zlib.crc32(np.ascontiguousarray(image).data) for image in images.numpy()], dtype=np.uint32)


def require_rows(images: Tensor, keys: Sequence[ViewKey], recorded: NDArray[np.uint32], ids: Sequence[str]) -> None:
    """Raise ReplayMismatchError naming the first of `images` [B, C, H, W] that is not the recorded one.

    `recorded` are the checksums [B] of `keys`; `ids` names the images of the data set, by index.
    """
    found = row_checksums(images)
    wrong = np.flatnonzero(found != recorded)
    if len(wrong) == 0:
        return
    row = int(wrong[0])
    view, index = keys[row]
    raise ReplayMismatchError(
        f"view {view} of image {ids[index]!r} (index {index}) is not the one that the teacher saw: its pixels have the "
        f"CRC-32 {found[row]:08x}, recorded is {recorded[row]:08x}; {len(wrong)} of the batch's {len(keys)} images "
        "differ. Fix: put back the original image and the recorded versions, or precompute again; verify: numeric "
        "compares only the canaries"
    )
