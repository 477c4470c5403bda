"""A recipe's entry of a network that is trained for int8, from the weights of a float run."""

from typing import Literal

from pydantic import Field

from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel, Side
from logitcache.models.quantization.fake_quantization import imitate_int8
from logitcache.models.quantization.quantized import Quantized
from logitcache.models.stored import OfRun


class QuantizedRun(OfRun):
    """A run's network with fake int8 quantisation, for quantisation-aware training; needs the extra `quant`.

    Weights are quantised per output channel, activations per tensor. Batch normalisation is folded into convolutions,
    and there is no dropout. `logitcache quantize RUN --qat` writes this entry.
    """

    kind: Literal["quantized"] = "quantized"
    input_size: tuple[Side, Side] = Field(
        description="Height and width of the images that the network takes.", examples=[[224, 224]]
    )
    keep_float: tuple[str, ...] = Field(
        default=(), description="Layers that stay in float, by the paths of their modules.", examples=[["conv1"]]
    )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the run's network with its final weights, and put fake quantisation into it."""
        self.architecture()
        module, preprocessing = super().build(num_classes, in_channels)
        return BuiltModel(imitate_int8(module, in_channels, self.input_size, self.keep_float), preprocessing)

    def architecture(self) -> Quantized:
        """Return the entry of the folder that the training writes. Raises RecipeError for a run of int8."""
        model = super().architecture()
        if isinstance(model, Quantized):
            raise RecipeError(f"{self.path} is quantised already. Fix: name the float run, or continue with --resume")
        return Quantized(model=model, input_size=self.input_size, keep_float=self.keep_float)
