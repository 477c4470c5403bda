"""Preprocessing, variants of a network, and the classifier around it: pixels as they are stored in, logits out."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from logitcache.config.recipe import Count, Extended, Fraction, Positive
from logitcache.errors import RecipeError

Interpolation = Literal["bilinear", "bicubic"]


class Preprocessing(Extended):
    """How pixels are normalised for a model: (x / 255 - mean) / std per channel, at `input_size`."""

    added: ClassVar[frozenset[str]] = frozenset({"interpolation"})

    mean: Annotated[tuple[Fraction, ...], Field(min_length=1)] = Field(
        description="Mean of each channel, in units of pixel / 255.", examples=[[0.485, 0.456, 0.406]]
    )
    std: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        description="Standard deviation of each channel, in units of pixel / 255.", examples=[[0.229, 0.224, 0.225]]
    )
    input_size: Count | tuple[Count, Count] | None = Field(
        default=None,
        description="Height and width that the model requires, one number for both; by default any size.",
        examples=[224],
    )
    interpolation: Interpolation = Field(
        default="bilinear",
        description="Interpolation with which images of another size are resized to `input_size`, antialiased.",
    )

    @model_validator(mode="after")
    def _same_channels(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}: one number each")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, or None when the model takes any."""
        if isinstance(self.input_size, int):
            return self.input_size, self.input_size
        return self.input_size


class Variant(Extended):
    """A variant of a network that computes the same function faster, up to rounding."""

    added: ClassVar[frozenset[str]] = frozenset({"compile"})

    channels_last: bool = Field(
        default=False, description="Whether weights and images are in channels-last memory format."
    )
    fold: bool = Field(default=False, description="Whether each BatchNorm is folded into the convolution before it.")
    compile: bool = Field(
        default=False,
        description="Whether `torch.compile` compiles the network, with its weights as constants. This takes seconds "
        "to minutes at every start and for every batch size, which pays off only on a large data set; `auto` does not "
        "try it.",
    )

    @property
    def text(self) -> str:
        """Name what is changed, as `channels_last and fold`; `plain` if nothing is."""
        return " and ".join(name for name, value in self if value) or "plain"


PLAIN = Variant()


class Classifier(nn.Module):
    """A network that takes uint8 pixels [B, C, H, W] and returns logits [B, K]; it normalises the pixels itself.

    Normalisation runs in float32 on the module's device. The mean and std are not part of its
    state. `classes` are the network's outputs that are its logits, in their order; by default all are.
    `who` names it in errors.
    """

    mean: Tensor
    std: Tensor
    _chosen: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        classes: Sequence[int] | None = None,
        who: str = "the model",
    ) -> None:
        super().__init__()
        self.module = module
        self.preprocessing = preprocessing
        self.classes = None if classes is None else tuple(classes)
        self._who = who
        chosen = None if classes is None else torch.tensor(self.classes, dtype=torch.int64)
        self.register_buffer("_chosen", chosen, persistent=False)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name), dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as `nn.Module` does. Raises RecipeError for an exported program that is to be trained.

        An exported program keeps the mode in which it was recorded.
        """
        try:
            return super().train(mode)
        except NotImplementedError as cause:  # raised by programs of torch.export
            if mode:
                raise RecipeError("an exported program cannot be trained. Fix: train the module itself") from cause
            for module in self.modules():
                module.training = mode
            return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, resize when the model has a size and the pixels another, and predict."""
        return self.checked(self.module(self.normalize(pixels)))

    def checked(self, output: object) -> Tensor:
        """Return the logits [B, K] of the classes in the network's output; raises as the two below."""
        return self.of_classes(self.outputs(output), 1)

    def outputs(self, output: object) -> Tensor:
        """Return the logits [B, N] of all classes in the network's output.

        These are a tensor; the entry `logits` of a dictionary or object, as of Hugging Face; or the only entry of a
        dictionary, tuple or list. Raises RecipeError for anything else.
        """
        found = _only_entry(output)
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise RecipeError(
                f"{self._who} returned {_described(output)}, not logits [B, K].\n"
                "  Fix: keep features alone (logits: null), or wrap it in a module whose forward returns logits alone; "
                "torchvision's GoogLeNet and Inception do so with model.options: {aux_logits: false}."
            )
        return found

    def of_classes(self, values: Tensor, axis: int) -> Tensor:
        """Return the part of values that belongs to the classes, along the axis that numbers the outputs.

        Raises RecipeError if there are fewer outputs.
        """
        if self.classes is None or self._chosen is None:
            return values
        count = values.shape[axis]
        beyond = sorted(output for output in self.classes if output >= count)
        if beyond:
            raise RecipeError(
                f"{self._who} has {count} outputs, and its `classes` name output {beyond[0]}"
                f"{f' and {len(beyond) - 1} more beyond' if beyond[1:] else ''}.\n"
                f"  Fix: outputs from 0 to {count - 1}"
            )
        return values.index_select(axis, self._chosen)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn uint8 [B, C, H, W] into the float32 [B, C, h, w] that the network takes."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise RecipeError(
                f"a model takes uint8 pixels [B, C, H, W], not {pixels.dtype} {list(pixels.shape)}.\n"
                "  Fix: pass the images as they were read; the model normalises them itself."
            )
        if pixels.shape[1] != len(self.mean):
            raise RecipeError(
                f"the images have {pixels.shape[1]} channels, the model's mean and std have"
                f" {len(self.mean)}.\n  Fix: {channels_fix(len(self.mean))}"
            )
        return self.scale(pixels.to(torch.float32))

    def scale(self, values: Tensor) -> Tensor:
        """Normalise float32 values of 0 to 255 [B, C, H, W], in place, once they have the network's size."""
        size = self.preprocessing.size
        if size is not None and values.shape[2:] != size:
            values = functional.interpolate(values, size, mode=self.preprocessing.interpolation, antialias=True)
            if self.preprocessing.interpolation == "bicubic":
                values = values.clamp_(0, 255)  # its weights are negative in part: it overshoots
        return values.div_(255).sub_(self.mean).div_(self.std)


def _only_entry(output: object) -> object:
    """Return the entry of a network's output that can only be its logits; the output itself without such an entry."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, (Mapping, tuple, list)):
        entries = list(output.values() if isinstance(output, Mapping) else output)
        return entries[0] if len(entries) == 1 else output
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _described(output: object) -> str:
    """Describe a network's output: its type, and the shapes of its tensors by name or place."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    entries = [_described(value) for value in output] if isinstance(output, (tuple, list)) else []
    if isinstance(output, Mapping):
        entries = [f"{name}: {_described(value)}" for name, value in output.items()]
    return f"a {type(output).__name__}" + (f" of {{{', '.join(entries)}}}" if entries else "")


def channels_fix(num_channels: int) -> str:
    """Describe how to get images with the channels that a model takes."""
    if (mode := {1: "L", 3: "RGB"}.get(num_channels)) is not None:
        return f"dataset: {{mode: {mode}}} reads every image with {num_channels} channels."
    return f"give images with {num_channels} channels, or a model made for these."
