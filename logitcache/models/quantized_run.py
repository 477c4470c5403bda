"""A recipe's entry of a network that is trained for int8, from the weights of a float run."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from logitcache.config.recipe import Component
from logitcache.config.trust import Trust
from logitcache.errors import RecipeError
from logitcache.models.base import BuiltModel
from logitcache.models.fake_quantization import imitate_int8
from logitcache.models.quantized import Quantized, Side
from logitcache.models.stored import Run


class QuantizedRun(Component):
    """A run's network with int8 arithmetic imitated, to train on (quantisation-aware); needs the extra `quant`.

    Weights are quantised by output channel, activations by tensor. Batch normalisation is folded into convolutions,
    and there is no dropout. `logitcache quantize RUN --qat` writes this entry.
    """

    kind: Literal["quantized"] = "quantized"
    path: str = Field(description="Folder of the float run.", examples=["runs/student"])
    input_size: tuple[Side, Side] = Field(
        description="Height and width of the images that the network takes.", examples=[[224, 224]]
    )
    keep_float: tuple[str, ...] = Field(
        default=(), description="Layers that stay in float, by the paths of their modules.", examples=[["conv1"]]
    )
    factory: str | None = Field(
        default=None,
        description="Function that builds the model of a run of a `custom` model, as `package.module:function`; "
        "one that a file names is never called.",
        examples=["mypackage.models:student"],
    )
    trust: Trust = Field(
        default=(),
        description="Digest of a `model.json` that names more than the allow-list, as its refusal prints it.",
        examples=[["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]],
    )

    @property
    def _run(self) -> Run:
        return Run(path=self.path, factory=self.factory, trust=self.trust)

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the run's network with its final weights, and put fake quantisation into it."""
        self.architecture()
        module, preprocessing = self._run.build(num_classes, in_channels)
        return BuiltModel(imitate_int8(module, in_channels, self.input_size, self.keep_float), preprocessing)

    def risks(self) -> tuple[str, ...]:
        """Name the folder, and the function that builds the model if there is one."""
        return self._run.risks()

    def architecture(self) -> Quantized:
        """Return the entry of the folder that the training writes. Raises RecipeError for a run of int8."""
        model = self._run.architecture()
        if isinstance(model, Quantized):
            raise RecipeError(f"{self.path} is quantised already. Fix: name the float run, or continue with --resume")
        return Quantized(model=model, input_size=self.input_size, keep_float=self.keep_float)

    def parent(self) -> dict[str, str]:
        """Return the digest of the weights that training starts from, which a continuation must not change."""
        weights = Path(self.path).expanduser() / "weights.safetensors"
        with open(weights, "rb") as file:
            return {"weights": hashlib.file_digest(file, "sha256").hexdigest()}
