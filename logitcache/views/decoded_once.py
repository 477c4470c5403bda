"""Images of files, decoded once for all processes of the machine if the pixels of all of them fit in a bounded memory.

They share a file of the memory file system, named after the digests of all images: a mark for each image, then the
pixels. The process that first reads an image writes its pixels, and its mark after them: the CRC-32 of the pixels,
which each process compares once. So a process may be killed at any moment, and none waits for another.
"""

import copy
import mmap
import os
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import LogitCacheError
from logitcache.store.shared_memory import SharedShards, name_of, shared_shards
from logitcache.views.datasets.base import digest_of
from logitcache.views.datasets.images.image_files import ImageFiles
from logitcache.views.spec import Views

_SHARE = 2
"""Images take at most this part of the shared memory: decoded shards need the rest."""

_ROUGH = 4
"""How many times too large an estimate from one image may be."""

_MARK = 4  # bytes


def decoded_once(views: Views) -> Views:
    """Return the same views, of images that are decoded once; as they are if memory may not or cannot hold them."""
    files, memory = views.images, shared_shards()
    if memory is None or not isinstance(files, ImageFiles) or not files.is_scanned:
        return views
    room = memory.limit // _SHARE
    try:
        if files.about_bytes() > _ROUGH * room:
            return views
        images = SharedImages(files, files.sizes(), files.digests())
    except (LogitCacheError, OSError):
        return views  # of a file that cannot be read; rendering raises it
    if images.num_bytes > room:
        return views
    if (refused := images.open(memory)) is not None:
        warnings.warn(
            f"shared memory refuses the {images.num_bytes} bytes of decoded images, which are decoded again for each "
            f"view: {refused.strerror}. Fix: a larger /dev/shm (a container's: docker run --shm-size 2g), or set "
            "LOGITCACHE_SHARED_MEMORY to fewer bytes, 0 for none",
            stacklevel=3,
        )
        return views
    shared = copy.copy(views)
    shared.images = images
    return shared


class SharedImages:
    """The images of files of sizes [n, 2] and digests [n]; what is decoded is kept for all processes.

    Images of files that are not those of the digests any more are decoded, and not kept.
    """

    def __init__(self, files: ImageFiles, sizes: NDArray[np.int64], digests: NDArray[np.uint64]) -> None:
        self._files, self._sizes, self._digests = files, sizes, digests
        stops = np.cumsum(sizes.prod(axis=1) * files.num_channels)
        self._starts = np.concatenate([[0], stops]) + _MARK * len(sizes)
        self._name = name_of(files.described().encode(), sizes.tobytes(), digests.tobytes())
        self._descriptor, self._memory = -1, np.empty(0, np.uint8)
        self._together: NDArray[np.uint8] | None = None
        """Images of one size, [n, H, W, C]."""
        self._compared = np.zeros(len(sizes), np.bool_)

    def __reduce__(self) -> tuple[Callable[..., "SharedImages"], tuple[Any, ...]]:
        """Open the memory in another process; one that cannot decodes for itself."""
        return _received, (self._files, self._sizes, self._digests)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shared file."""
        return int(self._starts[-1])

    def open(self, memory: SharedShards) -> OSError | None:
        """Open the shared file; return the error if there is no room for it."""
        try:
            self._descriptor = memory.fillable(self._name, self.num_bytes)
            mapped = mmap.mmap(self._descriptor, self.num_bytes, access=mmap.ACCESS_READ)
        except OSError as refused:
            return refused
        weakref.finalize(self, os.close, self._descriptor)
        self._memory = np.frombuffer(mapped, np.uint8)
        if (self._sizes == self._sizes[0]).all():
            shape = (len(self._sizes), *self._sizes[0].tolist(), self._files.num_channels)
            self._together = self._memory[self._starts[0] :].reshape(shape)
        return None

    def read(self, index: int) -> Tensor:
        """Return uint8 [C, H, W]; raises as the files do."""
        return self.read_batch([index])[0]

    def read_batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several images; those that no process has decoded are read together, decoded and kept."""
        rows = np.array(indices)
        missing = [index for index in rows[~self._compared[rows]].tolist() if not self._holds(index)]
        if not missing:
            return self._copies(rows)
        found = dict(zip(missing, map(self._decoded, missing, self._files.contents(missing)), strict=True))
        kept = rows[~np.isin(rows, missing)]
        found |= zip(kept.tolist(), self._copies(kept), strict=True)
        return [found[index] for index in indices]

    def sizes(self) -> NDArray[np.int64]:
        """Return heights and widths [n, 2]."""
        return self._sizes

    def _holds(self, index: int) -> bool:
        """Return whether the memory holds an image; from then on it is taken from there."""
        if len(self._memory):
            pixels, mark = self._memory[slice(*self._starts[index : index + 2])], _MARK * index
            self._compared[index] = self._memory[mark : mark + _MARK].tobytes() == _mark_of(pixels.data)
        return bool(self._compared[index])

    def _copies(self, rows: NDArray[np.int64]) -> list[Tensor]:
        """Copy images out of the memory: augmentations may write to them."""
        if self._together is not None:
            return list(_channels_first(torch.from_numpy(self._together[rows])).unbind())
        places = zip(self._starts[rows].tolist(), self._starts[rows + 1].tolist(), strict=True)
        copies = [torch.from_numpy(self._memory[start:stop].copy()) for start, stop in places]
        shapes = self._sizes[rows].tolist()
        return [_channels_first(pixels.view(*shape, -1)) for pixels, shape in zip(copies, shapes, strict=True)]

    def _decoded(self, index: int, content: bytes) -> Tensor:
        image = self._files.decoded(content, index)
        same = digest_of(content) == self._digests[index] and tuple(image.shape[1:]) == tuple(self._sizes[index])
        if len(self._memory) and same:
            pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
            with suppress(OSError):
                os.pwrite(self._descriptor, pixels, int(self._starts[index]))
                os.pwrite(self._descriptor, _mark_of(pixels), _MARK * index)
        return image


def _channels_first(pixels: Tensor) -> Tensor:
    """Return images [..., C, H, W] of pixels [..., H, W, C], without a copy, as a decoder does.

    Some kernels round otherwise if the memory lies in another order.
    """
    return pixels.movedim(-1, -3) if pixels.shape[-1] > 1 else pixels.squeeze(-1).unsqueeze(-3)


def _mark_of(pixels: bytes | memoryview) -> bytes:
    """Return the CRC-32 of an image; another number in place of 0, which stands for none."""
    return (zlib.crc32(pixels) or 1).to_bytes(_MARK, "little")


def _received(files: ImageFiles, sizes: NDArray[np.int64], digests: NDArray[np.uint64]) -> SharedImages:
    images, memory = SharedImages(files, sizes, digests), shared_shards()
    if memory is not None:
        images.open(memory)
    return images
