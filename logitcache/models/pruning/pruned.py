"""A run's network with fewer channels or weights, to be trained further."""

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from logitcache.config.recipe import Count
from logitcache.errors import RecipeError, needs_extra
from logitcache.models.base import BuiltModel, Side
from logitcache.models.operations import flops_of
from logitcache.models.pruning.pruned_network import PrunedNetwork
from logitcache.models.quantization.quantized import Quantized
from logitcache.models.stored import Architecture, OfRun, unwrapped

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
_SEARCH_STEPS, _MOST = 5, 0.95


class Pruned(OfRun):
    """The pruned network of a run with its remaining weights, for fine-tuning.

    `macs` removes channels with torch-pruning: the same share from each group of dependent layers, those with the
    smallest L2 norm over the group ("DepGraph: Towards Any Structural Pruning", arXiv:2301.12900). `sparsity` sets the
    weights with the smallest magnitude of all convolutions and linear layers to zero
    (torch.nn.utils.prune.global_unstructured) and keeps them at zero. The output layer keeps its classes.
    """

    kind: Literal["pruned"] = "pruned"
    macs: Share | None = Field(
        default=None,
        description="Largest share of the multiply-adds to keep, by removing channels.",
        examples=[0.5],
    )
    sparsity: Share | None = Field(
        default=None,
        description="Share of the weights of convolutions and linear layers to set to zero; shapes do not change.",
        examples=[0.8],
    )
    input_size: tuple[Side, Side] | None = Field(
        default=None,
        description="Height and width of the images for which multiply-adds are counted, in pixels; by default the "
        "input size of the run's model.",
        examples=[[32, 32]],
    )
    round_to: Count = Field(default=8, description="With `macs`, layers keep a multiple of this number of channels.")
    unpruned: tuple[str, ...] = Field(
        default=(),
        description="Paths of layers that are not pruned, in addition to the output layer.",
        examples=[["features.0.0"]],
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if (self.macs is None) == (self.sparsity is None):
            raise ValueError("give one of `macs` and `sparsity`")
        return self

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Build the run's network with its final weights, and prune it. Raises RecipeError."""
        if isinstance(super().architecture(), Quantized):
            raise RecipeError(f"{self.path} is quantised, and no layers are left to prune.\n  Fix: prune before that")
        built = super().build(num_classes, in_channels)
        layers = self._layers(built.module)
        if self.sparsity is not None:
            _mask(layers.values(), self.sparsity)
            return built
        assert self.macs is not None, "the validator asked for one of both"
        image = torch.zeros((2, in_channels, *self._size))
        return BuiltModel(self._with_fewer_channels(built.module, layers, image), built.preprocessing)

    def architecture(self) -> Architecture:
        """Return the run's architecture, without the channels that pruning removes."""
        return super().architecture() if self.macs is None else self.architecture_of(self.build(*self._counts).module)

    def architecture_of(self, module: nn.Module) -> Architecture:
        """Return the architecture of a module that was built from this entry."""
        before = super().architecture()
        return before if self.macs is None else self._described(before, module)

    def plain(self, module: nn.Module) -> nn.Module:
        """Return a trained module as plain layers."""
        return _unmasked(module) if self.macs is None else module

    def _described(self, before: Architecture, module: nn.Module) -> PrunedNetwork:
        return PrunedNetwork.of(unwrapped(before), module, self._counts, self._size)

    @property
    def _counts(self) -> tuple[int, int]:
        """The run's numbers of classes and of input channels."""
        stored = self.stored()
        return stored.num_classes, stored.in_channels

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width for which multiply-adds are counted."""
        size = self.input_size or self.stored().preprocessing.size
        if size is None:
            raise RecipeError(
                f"the model of {self.path} takes images of any size, and multiply-adds depend on it.\n"
                "  Fix: add the height and width that it is used at, as in input_size: [32, 32]"
            )
        return size

    def _layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the convolutions and linear layers to prune: all but those of the classes and the `unpruned`."""
        parts, num_classes = dict(module.named_modules()), self._counts[0]
        if unknown := [path for path in self.unpruned if path not in parts]:
            raise RecipeError(f"the model of {self.path} has no layer '{unknown[0]}'.\n  Fix: correct `unpruned`")
        left_out = {id(part) for path in self.unpruned for part in parts[path].modules()}
        return {
            path: part
            for path, part in parts.items()
            if isinstance(part, LAYERS) and id(part) not in left_out and part.weight.shape[0] != num_classes
        }

    def _with_fewer_channels(self, module: nn.Module, layers: dict[str, nn.Module], image: Tensor) -> nn.Module:
        """Remove the smallest share of channels that leaves at most `macs` of the multiply-adds, by bisection.

        A share c of the channels keeps from c² (convolutions) to c (depthwise ones) of a layer's multiply-adds.
        """
        assert self.macs is not None, "the validator asked for one of both"
        most = flops_of(module, image) * self.macs
        least, enough, found = 1 - math.sqrt(self.macs), _MOST if self.unpruned else 1 - self.macs, None
        share = enough
        for _ in range(1 + _SEARCH_STEPS):
            pruned = self._without(share, module, layers, image)
            if pruned is None or flops_of(pruned, image) <= most:
                enough, found = share, found if pruned is None else pruned
            else:
                least = share
            share = (least + enough) / 2
        if found is None:
            raise RecipeError(
                f"macs {self.macs} of the multiply-adds of {self.path} cannot be reached by removing the same share of "
                f"all channels, in multiples of {self.round_to}.\n"
                "  Fix: a larger `macs`, round_to: 1, or fewer `unpruned`"
            )
        return found

    def _without(
        self, share: float, module: nn.Module, layers: dict[str, nn.Module], image: Tensor
    ) -> nn.Module | None:
        """Remove a share of the channels from a copy of a module; None if a layer would lose all of them.

        Raises RecipeError if torch-pruning cannot prune the module, MissingExtraError if it is not installed.
        """
        with needs_extra("removing channels", "prune"):
            import torch_pruning
        module = copy.deepcopy(module).eval()
        left_out = [part for path, part in module.named_modules() if isinstance(part, LAYERS) and path not in layers]
        try:
            with warnings.catch_warnings():
                # Parameters outside of layers, such as the scales of ConvNeXt, are pruned along their longest axis.
                warnings.filterwarnings("ignore", "Unwrapped parameters detected", UserWarning)
                torch_pruning.pruner.BasePruner(
                    module,
                    image,
                    importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                    pruning_ratio=share,
                    ignored_layers=left_out,
                    round_to=self.round_to,
                ).step()
            if not all(value.numel() for value in module.parameters()):
                return None
            with torch.no_grad():
                logits = module(image)
        except Exception as cause:  # the tracer runs the network's own code
            raise RecipeError(
                f"torch-pruning cannot remove channels of the model of {self.path}: {cause}.\n"
                "  Fix: list the layers on which it fails in `unpruned`, or set weights to zero: sparsity: 0.5"
            ) from cause
        if logits.shape[-1] != self._counts[0]:
            raise RecipeError(
                f"torch-pruning removes classes of the model of {self.path}.\n"
                "  Fix: list its output layer in `unpruned`, or set weights to zero: sparsity: 0.5"
            )
        return module


class _Mask(nn.Module):
    """Keep weights at zero, as a parametrization of torch.nn.utils.parametrize."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Multiply by 0 or 1."""
        return weight * self.mask


def _mask(layers: Iterable[nn.Module], sparsity: float) -> None:
    """Set the share of the weights with the smallest magnitude to zero, and keep them there."""
    pairs = [(layer, "weight") for layer in layers]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=sparsity)
    for layer, name in pairs:
        mask = layer.get_buffer(f"{name}_mask")
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
        parametrize.register_parametrization(layer, name, _Mask(mask))


def _unmasked(module: nn.Module) -> nn.Module:
    """Copy a module, with the masked weights as plain parameters."""
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight") and any(isinstance(each, _Mask) for each in part.modules()):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    return module
