"""Networks trained for int8, as entries: of a run folder, and of a recipe that starts from a float run."""

from typing import Annotated, Literal

from pydantic import Field

from logitcache.config.recipe import Component
from logitcache.models.base import BuiltModel, Side
from logitcache.models.pruning.pruned_network import Network, PrunedNetwork
from logitcache.models.quantization.fake_quantization import imitate_int8

FloatNetwork = Annotated[Network | PrunedNetwork, Field(discriminator="kind")]


class Quantized(Component):
    """The stored form of a network with fake quantisation: the float network, and how it was recorded."""

    kind: Literal["quantized"] = "quantized"
    model: FloatNetwork
    input_size: tuple[Side, Side]
    keep_float: tuple[str, ...] = ()

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the float network with random weights, and put fake quantisation into it."""
        module, preprocessing = self.model.build(num_classes, in_channels)
        return BuiltModel(imitate_int8(module, in_channels, self.input_size, self.keep_float), preprocessing)

    def risks(self) -> tuple[str, ...]:
        """Name those of the float network."""
        return self.model.risks()

    def architecture(self) -> "Quantized":
        """Return the same with an architecture of random weights."""
        return self.model_copy(update={"model": self.model.architecture()})
