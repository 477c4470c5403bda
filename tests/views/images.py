"""A data set in memory, with the faults that a reader can have; a module, as spawned workers import it."""

import os
import signal
import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import DataError
from logitcache.views.datasets.base import pixel_digest


@dataclass
class Images:
    """Decoded images.

    Reading `broken` raises DataError, `deadly` ends the process, `fatal` has it killed, and `endless` never ends.
    """

    pixels: list[Tensor]
    broken: int | None = None
    deadly: int | None = None
    fatal: int | None = None
    endless: int | None = None

    num_classes = 3
    class_names = None

    @property
    def ids(self) -> list[str]:
        return [f"image {index}" for index in range(len(self.pixels))]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.arange(len(self.pixels), dtype=np.int64) % 3

    def read(self, index: int) -> Tensor:
        if index == self.broken:
            raise DataError(f"{self.ids[index]} cannot be read")
        if index == self.deadly:
            os._exit(7)
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.endless:
            threading.Event().wait()
        return self.pixels[index]

    def sizes(self) -> NDArray[np.int64]:
        return np.array([image.shape[1:] for image in self.pixels], dtype=np.int64)

    def digests(self) -> NDArray[np.uint64]:
        return np.array([pixel_digest(image) for image in self.pixels], dtype=np.uint64)


def textured(count: int, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> list[Tensor]:
    """Images with what photographs have: slopes, edges and grain."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    coarse = torch.rand((count, channels, 5, 5), generator=generator) * 255
    slopes = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    edges = 60.0 * (torch.rand(shape, generator=generator) < 0.1)
    grain = torch.randn(shape, generator=generator) * 12
    return list((slopes + edges + grain).clamp(0, 255).to(torch.uint8))
