"""The one small network of our own: teacher of the demo when wide, its student when narrow."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from logitcache.config.recipe import Count
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel, OwnArchitecture

MOST_WIDTH, MOST_DEPTH = 1024, 64
"""The largest that a file may name; a user may name more."""


def _convolution(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside a skip connection, at one width and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(width, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _convolution(width, width),
            nn.BatchNorm2d(width),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same shape."""
        out: Tensor = self.activation(features + self.body(features))
        return out


def small_cnn(width: int, depth: int, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build the network: `width` at half the input's size, twice that width at a quarter.

    Pooling comes before the first normalisation: the full-size maps are what costs time on a CPU.
    """
    features = nn.Sequential(
        _convolution(in_channels, width),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        *(Residual(width) for _ in range(depth)),
        _convolution(width, 2 * width, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        *(Residual(2 * width) for _ in range(depth)),
    )
    head = nn.Linear(2 * width, num_classes)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class SmallCNN(OwnArchitecture):
    """A small residual network for images of at least 8 × 8 pixels, with blocks at two resolutions.

    With one block, grey images and ten classes: width 8 has 7 thousand parameters, width 32 has 112 thousand.
    """

    kind: Literal["small_cnn"] = "small_cnn"
    width: Count = Field(
        default=8, description="Channels of the first blocks; those at the lower resolution have twice as many."
    )
    depth: Count = Field(default=1, description="Blocks at each of the two resolutions.")

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the network with random weights."""
        if num_classes is None:
            raise RecipeError(
                "small_cnn does not know how many classes to predict.\n"
                "  Fix: a teacher needs weights: {kind: run, path: …}, or {kind: checkpoint, path: …} with\n"
                "    small_cnn as its `model` and `num_classes` beside it."
            )
        return BuiltModel(small_cnn(self.width, self.depth, num_classes, in_channels), None)

    def risks(self) -> tuple[str, ...]:
        """Name a size that would not fit in memory."""
        large = self.width > MOST_WIDTH or self.depth > MOST_DEPTH
        return (f"a network of width {self.width} and depth {self.depth}",) if large else ()
