"""The stored form of a network that lost channels: its architecture before, and what became smaller."""

import copy
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from logitcache.config.recipe import Count
from logitcache.models.base import BuiltModel, OwnArchitecture, Side
from logitcache.models.custom import Custom
from logitcache.models.hugging_face.transformers import TransformersNetwork
from logitcache.models.small_cnn import SmallCNN
from logitcache.models.timm import Timm
from logitcache.models.torchvision import Torchvision

Network = SmallCNN | Torchvision | Timm | TransformersNetwork | Custom
"""A network as it was before anything was removed or imitated."""
Unpruned = Annotated[Network, Field(discriminator="kind")]

LayerSize = Literal[
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features", "normalized_shape"
]
_SIZES: tuple[LayerSize, ...] = LayerSize.__args__  # type: ignore[attr-defined]
Shape = Annotated[tuple[Count, ...], Field(max_length=8)]


class PrunedNetwork(OwnArchitecture):
    """A network with fewer channels than the architecture that it was pruned from.

    Initially, each smaller parameter has the first values of the architecture's own along each axis.
    """

    kind: Literal["pruned_network"] = "pruned_network"
    model: Unpruned = Field(
        description="Architecture before pruning.",
        examples=[{"kind": "torchvision", "name": "resnet18", "weights": None}],
    )
    sizes: dict[str, dict[LayerSize, Count | Shape]] = Field(
        description=f"Attributes of the pruned layers, by the path of the layer: {', '.join(_SIZES)}.",
        examples=[{"layer1.0.conv1": {"out_channels": 40}}],
    )
    shapes: dict[str, Shape] = Field(
        description="Shapes of the pruned parameters and buffers, by their names.",
        examples=[{"layer1.0.conv1.weight": [40, 64, 3, 3]}],
    )
    input_size: tuple[Side, Side] = Field(
        description="Height and width of the images that the network was pruned for, in pixels.", examples=[[224, 224]]
    )

    @classmethod
    def of(cls, model: Unpruned, module: nn.Module, counts: tuple[int, int], input_size: tuple[int, int]) -> Self:
        """Describe a pruned module by how it differs from its architecture before.

        `counts` are the numbers of classes and of input channels.
        """
        original = model.build(*counts).module
        parts, state = dict(original.named_modules()), original.state_dict()
        sizes = {name: _changed(parts[name], part) for name, part in module.named_modules() if name in parts}
        return cls(
            model=model,
            sizes={name: changed for name, changed in sizes.items() if changed},
            shapes={
                name: tuple(value.shape)
                for name, value in module.state_dict().items()
                if name in state and value.shape != state[name].shape
            },
            input_size=input_size,
        )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the architecture and make its layers smaller.

        Raises LookupError or RuntimeError if the sizes are not those of a pruned network.
        """
        built = self.model.build(num_classes, in_channels)
        parts = dict(built.module.named_modules())
        for name, sizes in self.sizes.items():
            for attribute, size in sizes.items():
                if attribute not in vars(parts[name]):
                    raise LookupError(f"layer '{name}' has no {attribute}")
                setattr(parts[name], attribute, size)
        for name, shape in self.shapes.items():
            owner, _, leaf = name.rpartition(".")
            _shrink(parts[owner], leaf, shape)
        self._try(built.module, in_channels)
        return built

    def _try(self, module: nn.Module, in_channels: int) -> None:
        """Run the network on an image without values: layers that do not fit one another raise RuntimeError."""
        image = torch.zeros((1, in_channels, *self.input_size), device="meta")
        with torch.no_grad():
            copy.deepcopy(module).to("meta").eval()(image)

    def risks(self) -> tuple[str, ...]:
        """Name the risks of the architecture before."""
        return self.model.risks()


def _changed(before: nn.Module, after: nn.Module) -> dict[LayerSize, int | tuple[int, ...]]:
    """Return the attributes of a layer that pruning changed."""
    return {
        name: tuple(size) if isinstance(size, tuple | list) else size
        for name in _SIZES
        if (size := vars(after).get(name)) is not None and size != vars(before).get(name)
    }


def _shrink(part: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Keep the first values of a parameter or buffer along each axis."""
    value = {**part._parameters, **part._buffers}.get(name)
    if value is None:
        raise LookupError(f"a {type(part).__name__} has no '{name}'")
    if len(shape) != value.ndim or any(size > full for size, full in zip(shape, value.shape, strict=True)):
        raise IndexError(f"'{name}' is {list(value.shape)} and cannot shrink to {list(shape)}")
    kept: Tensor = value.detach()[tuple(slice(size) for size in shape)].clone()
    setattr(part, name, nn.Parameter(kept, requires_grad=value.requires_grad) if name in part._parameters else kept)
