"""Models from a file of weights of the user's own."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from logitcache.config.recipe import Component, Count
from logitcache.models.base import BuiltModel
from logitcache.models.quantization.quantized import FloatNetwork
from logitcache.models.weights import load_weights, read_state


class Checkpoint(Component):
    """Your own weights in an architecture: safetensors, or a torch file that loads with `weights_only=True`.

    Set `preprocessing`, as a file of weights does not contain it.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    model: FloatNetwork = Field(
        description="Architecture of the weights.",
        examples=[{"kind": "torchvision", "name": "resnet50", "weights": None}],
    )
    path: str = Field(description="File of the weights.", examples=["teacher.safetensors"])
    key: str | None = Field(
        default=None,
        description="Entry of the file that holds the weights, if there are several; by default the file is the state "
        "dict.",
        examples=["state_dict"],
    )
    prefix: str | None = Field(
        default=None,
        description="Prefix to remove from parameter names; names without it are ignored. By default names are "
        "unchanged.",
        examples=["module."],
    )
    num_classes: Count | None = Field(
        default=None,
        description="Number of outputs of the weights, if it is not the number of classes of the images.",
        examples=[1000],
    )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the architecture and load the file into it."""
        module = self.architecture().build(self.num_classes or num_classes, in_channels).module
        path = Path(self.path).expanduser()
        load_weights(module, read_state(path, self.key, self.prefix), str(path))
        return BuiltModel(module, None)

    def risks(self) -> tuple[str, ...]:
        """Name the file, and the risks of the architecture."""
        return (f"the checkpoint '{self.path}'", *self.model.risks())

    def architecture(self) -> FloatNetwork:
        """Return the architecture with random weights."""
        return self.model.architecture()
