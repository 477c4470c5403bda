"""What tests of augmentations share."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.views.augmentations import Augmentation
from logitcache.views.keys import Draws, ViewKey


def keys_of(count: int, view: int = 0) -> list[ViewKey]:
    return [ViewKey(view, index) for index in range(count)]


def plan_one(augmentation: Augmentation, sizes: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return augmentation.plan(Draws.of(seed, keys_of(len(sizes))), 0, np.array(sizes, dtype=np.int64))


def image_of(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)
