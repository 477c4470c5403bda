"""Networks, runs and files of weights for the tests of models."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from logitcache.models import (
    Custom,
    StoredModel,
    default_preprocessing,
    save_model,
)

TINY_TIMM = "test_resnet.r160_in1k"
GREY = default_preprocessing(1)
RGB = default_preprocessing(3)


def linear_model(in_channels: int, num_classes: int) -> nn.Module:
    """Stand in for a user's own factory."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * in_channels, num_classes))


class Tied(nn.Module):
    """A network with one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


class Wrapped(nn.Module):
    """A user's network whose every name begins as those of torch's own wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def custom(factory: str, **arguments: Any) -> Custom:
    return Custom(factory=f"tests.models.nets:{factory}", arguments=arguments)


def saved_run(directory: Path, model: Any, num_classes: int, channels: int) -> nn.Module:
    """Write a run directory; returns the network in it."""
    directory.mkdir(parents=True)
    module = model.build(num_classes, channels).module.eval()
    preprocessing = default_preprocessing(channels)
    stored = StoredModel(
        model=model.architecture(),
        preprocessing=preprocessing,
        num_classes=num_classes,
        in_channels=channels,
    )
    save_model(directory, module, stored)
    return module


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def written(path: Path, content: Any) -> str:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return str(path)


LINEAR = custom("linear_model", in_channels=1, num_classes=3)
