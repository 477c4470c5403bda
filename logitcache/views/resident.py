"""Small sets on the device: images are decoded once and stay there, where views are rendered in batches.

A view is the same function of its key as everywhere: the same bytes, without processes and without copies of pixels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import DataError
from logitcache.runtime.device import to_device
from logitcache.views.datasets.base import read_images
from logitcache.views.decoded_once import decoded_once
from logitcache.views.keys import Draws, ViewKey, columns_of
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.spec import Views

NumWorkers = int | Literal["auto"]

SHARE = 16
"""Images stay on a device of which they take one part of so many at most: of its free memory, or of the machine's."""

WORKERS = 2
"""Processes of `auto`, unless images may stay on the device."""


def open_loader(
    views: Views, num_workers: NumWorkers, start_method: StartMethod, device: torch.device, compares: bool
) -> "ResidentViews | ViewLoader":
    """Open what renders batches; `auto` takes no processes if images may stay on the device.

    `compares`: every image is compared with a checksum, which is computed on the CPU.
    """
    if num_workers != "auto":
        return ViewLoader(views, num_workers, start_method)
    place = torch.device("cpu") if compares or device.type == "mps" else device
    if not may_stay(views, place):
        return ViewLoader(views, WORKERS, start_method)
    return ResidentViews(decoded_once(views), place)


def may_stay(views: Views, device: torch.device) -> bool:
    """Return whether the images of views may stay on a device: few, of one size, and augmented by whole batches."""
    sizes, draws = views.images.sizes(), Draws.of(views.spec.seed, [ViewKey(0, 0)])
    if views.frame is not None or not len(sizes) or (sizes != sizes[0]).any():
        return False
    size = sizes[:1]
    for augmentation in views.spec.augmentations:
        height, width = size[0].tolist()
        if not augmentation.in_batches((height, width)):
            return False
        _, size = augmentation.plan(draws, 0, size)
    try:
        image = views.images.read(0)
    except DataError:  # raised again when the image is rendered, with its view
        return False
    return len(sizes) * image.numel() <= _memory(device) // SHARE


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class ResidentViews(Views):
    """Views that are rendered on a device, where images stay once they have been decoded."""

    together: ClassVar[int] = 1 << 20
    """Bytes of batches that are worth making together: many share the price of a call, and stay in a core's cache."""

    def __init__(self, views: Views, device: torch.device) -> None:
        """Take views of images of one size, whose augmentations take it `in_batches`."""
        super().__init__(views.dataset, views.spec, views.recorded)
        self.images, self.device = views.images, device
        shape = self.images.read(0).shape
        self._pixels = torch.empty((len(self.dataset.ids), *shape), dtype=torch.uint8, device=device)
        self._is_held = np.zeros(len(self._pixels), dtype=bool)

    def render(self, batches: Iterable[Sequence[ViewKey]]) -> Iterator[Tensor]:
        """Yield one uint8 [B, C, H, W] per batch of keys."""
        return map(self.__getitems__, batches)

    def close(self) -> None:
        """Forget the images; nothing can be rendered afterwards."""
        self._pixels = self._pixels[:0]

    def _augmented(self, keys: Sequence[ViewKey]) -> Tensor:
        _, indices = columns_of(keys)
        if not self._is_held[indices].all():
            self._hold(sorted({*indices[~self._is_held[indices]].tolist()}))
        images = self._pixels.index_select(0, to_device(torch.from_numpy(indices), self.device))
        sizes = np.broadcast_to(np.array(images.shape[2:], np.int64), (len(keys), 2))
        for augmentation, params in zip(self.spec.augmentations, self._plans(keys, sizes), strict=True):
            change = augmentation.apply if images.is_cpu else augmentation.apply_in_batches
            images = change(images, params)
        return images.contiguous()

    def _hold(self, indices: list[int]) -> None:
        """Decode images that are not there yet. Raises DataError for images of different channels."""
        decoded = read_images(self.images, indices)
        for index, image in zip(indices, decoded, strict=True):
            if image.shape != self._pixels.shape[1:]:
                self.stack([self.images.read(0), image], [ViewKey(0, 0), ViewKey(0, index)])
        places = to_device(torch.tensor(indices), self.device)
        self._pixels[places] = to_device(torch.stack(decoded), self.device)
        self._is_held[indices] = True
