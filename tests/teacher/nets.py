"""A teacher with everything that is worth tapping, small enough to be computed by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tests.cache.made import Pixels, teacher

SIDE, CLASSES = 8, 5


class Net(nn.Module):
    """A convolution, tokens of its places, a linear layer on their mean; in float64, so that batches do not matter."""

    def __init__(self, num_classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.relu = nn.ReLU()
            self.tokens = nn.Linear(6, 4)
            self.idle = nn.Linear(4, 4)
            self.fc = nn.Linear(4, num_classes)
        self.double().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.conv(images.double()))
        tokens = self.tokens(maps.flatten(2).transpose(1, 2))
        return self.fc(tokens.tanh().mean(dim=1))


def attentive() -> nn.Module:
    """Return a small vision transformer of torchvision, whose attention has a path of its own without gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VisionTransformer(SIDE, 2, 2, 4, 64, 128, num_classes=CLASSES)
        for parameter in network.heads.parameters():  # zeros, before it is trained
            nn.init.normal_(parameter)
    return network


FEATURES: dict[str, Any] = {
    "maps": {"kind": "maps", "tap": "relu", "dtype": "float32"},
    "small": {"kind": "maps", "tap": "relu", "size": 2, "dtype": "float32", "storage": "packed"},
    "pooled": {"kind": "pooled", "tap": "relu", "dtype": "float32", "storage": "packed"},
    "tokens": {"kind": "maps", "tap": "tokens", "dtype": "float32"},
    "attention": {"kind": "attention", "tap": "relu", "dtype": "float32"},
    "cam": {"kind": "grad_cam", "tap": "relu", "dtype": "float32"},
    "bytes": {"kind": "maps", "tap": "relu", "dtype": "int8", "storage": "packed"},
    "projected": {"kind": "maps", "tap": "relu", "channels": 3, "dtype": "float32", "storage": "packed"},
    "projected_tokens": {"kind": "maps", "tap": "tokens", "channels": 2, "dtype": "int8", "storage": "packed"},
}
"""One of every kind and option."""


def images(count: int = 60) -> Pixels:
    return Pixels(count, num_classes=CLASSES, side=SIDE)


def keeping(logits: Any = None, features: Any = None) -> dict[str, Any]:
    """Return a recipe's entry of the teacher; packed, so that shards may have any rows."""
    kept = {"kind": "dense", "dtype": "float32", "storage": "packed"} if logits is None else logits
    return teacher(kept if isinstance(kept, dict) else {}, features=features or {}) | {"logits": kept or None}
