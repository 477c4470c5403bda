"""The residual networks for small images that papers on CIFAR train, as factories for recipes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: every second pixel, and channels of zeros."""

    def __init__(self, incoming: int, width: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if incoming == width else (2, (width - incoming) // 2)
        self.conv1 = nn.Conv2d(incoming, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, incoming, H, W] to [B, width, H / stride, W / stride]."""
        found = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(images)))))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        return functional.relu(found + functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for images of 32 px: He et al. 2016, "Deep residual learning", section 4.2, option A."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        for number, width in enumerate(WIDTHS, 1):
            blocks = [Block(before if first else width, width) for first in (True, *[False] * ((depth - 2) // 6 - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = width
        self.linear = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] of [B, 3, 32, 32]."""
        found = functional.relu(self.bn1(self.conv1(images)))
        for number in range(1, len(WIDTHS) + 1):
            found = self.get_submodule(f"layer{number}")(found)
        logits: Tensor = self.linear(found.mean((2, 3)))
        return logits


def resnet(depth: int, num_classes: int = 10) -> nn.Module:
    """Build a network of so many layers, 8, 20, 56 or another 6 n + 2."""
    return CifarResNet(depth, num_classes)


def published_resnet(depth: int, checkpoint: str) -> nn.Module:
    """Build a network with the weights of a file of github.com/akamaster/pytorch_resnet_cifar10."""
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    network = CifarResNet(depth)
    network.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return network
