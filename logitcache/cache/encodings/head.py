"""Logits as what the last linear layer takes in, with its weights: exact for any number of classes, at its width."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from logitcache.cache.encodings.base import (
    CalibrationSample,
    Fitted,
    LogitsEncoding,
    LogitsForm,
    RowArray,
    Tables,
    TableShape,
)
from logitcache.cache.encodings.features import Feature
from logitcache.cache.format.arrays import Storage
from logitcache.config.recipe import Count, Name
from logitcache.errors import RecipeError
from logitcache.logits import CompactLogits, Logits
from logitcache.reductions import INPUT

PENULTIMATE = "penultimate"
"""The feature that a head's input is kept as."""

TOLERANCE = 0.02
"""Of the largest logit: bfloat16 has 8 bits."""


class Head(LogitsEncoding):
    """The input of the last linear layer instead of its output: 2 D or 4 D bytes for D inputs, whatever C is.

    The layer's weights are stored in the cache, and logits are computed as W x + b. The input is also the feature
    `penultimate`, for feature losses.
    """

    kind: Literal["head"] = "head"
    module: str | None = Field(
        default=None, description="Path of the linear layer; by default the last one of the network.", examples=["fc"]
    )
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Type of the numbers.")
    storage: Storage = "hot"

    def path(self, network: nn.Module) -> str:
        """Return the path of the linear layer. Raises RecipeError if there is none."""
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        path = self.module if self.module is not None or not linear else linear[-1]
        if path is None or path not in linear:
            what = "the network has none" if path is None else f"{path!r} is none"
            others = f"one of {linear}, or dense" if linear else "another kind, as dense"
            raise RecipeError(f"kind: head keeps the input of an nn.Linear, and {what}. Fix: {others}")
        return path

    def features(self, network: nn.Module) -> dict[str, Feature]:
        """Return the features that are kept for it."""
        tap = self.path(network) + INPUT
        return {PENULTIMATE: Feature(kind="maps", tap=tap, dtype=self.dtype, storage=self.storage)}

    def largest(self, network: nn.Module, num_classes: int) -> "HeadForm":
        """Return the form, which only the layer decides."""
        layer = self._layer(network)
        return HeadForm(width=layer.in_features, bias="bias" in dict(layer.named_parameters()), storage=self.storage)

    def _layer(self, network: nn.Module) -> nn.Linear:
        layer = network.get_submodule(self.path(network))
        assert isinstance(layer, nn.Linear)
        return layer

    def fitted(self, sample: CalibrationSample) -> "FittedHead":
        """Take the weights. Raises RecipeError if the logits are not the output of the layer."""
        network = sample.classifier.module
        path, layer = self.path(network), self._layer(network)
        own = {name: value for name, value in layer.named_parameters() if name in ("weight", "bias")}
        rows = {name: sample.classifier.of_classes(value.detach(), 0) for name, value in own.items()}
        tables = {name: values.float().cpu().numpy() for name, values in rows.items()}
        weight = tables["weight"]
        form = HeadForm(width=weight.shape[1], bias="bias" in tables, storage=self.storage)
        head = FittedHead(form, tables)
        values, logits = sample.examples.features[PENULTIMATE].float().cpu(), sample.examples.logits
        assert isinstance(logits, Tensor)
        logits = logits.float().cpu()
        found = head.logits(values) if values.shape[1:] == weight.shape[1:] else logits.new_full((1, 1), torch.inf)
        if found.shape != logits.shape or float((found - logits).abs().max()) > TOLERANCE * float(logits.abs().max()):
            raise RecipeError(
                f"kind: head: the logits are not what {path!r} puts out. Fix: `module:` names the layer that ends the "
                "network, or kind: transform"
            )
        return head


class HeadForm(LogitsForm):
    """A linear layer of some width, with a bias or without, on the feature `feature`."""

    gives: ClassVar[frozenset[str]] = frozenset({"logits", "raw logits"})
    table_names: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})

    kind: Literal["head"] = "head"
    feature: Name = PENULTIMATE
    width: Count
    bias: bool
    storage: Storage

    @property
    def needs(self) -> Mapping[str, int]:
        """The feature that it is decoded from, and how wide a vector that is."""
        return {self.feature: self.width}

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row takes: none beside the feature."""
        return ()

    def table_shapes(self, num_classes: int) -> dict[str, TableShape]:
        """List the weights of the layer."""
        bias = {"bias": TableShape((num_classes,), "float32")} if self.bias else {}
        return {"weight": TableShape((num_classes, self.width), "float32"), **bias}

    def ready(self, tables: Tables) -> "FittedHead":
        """Restore the layer from its weights."""
        return FittedHead(self, tables)


@dataclass(frozen=True, eq=False)
class FittedHead(Fitted):
    """A linear layer: tables weight, float32 [C, D], and bias, float32 [C], if it has one."""

    form: HeadForm

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Keep nothing of the logits: the feature is kept as such."""
        return {}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form, which becomes float32 logits on the device; rows hold the feature."""
        return CompactLogits({self.form.feature: rows[self.form.feature]}, num_classes, self._decoded)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return logits, float32 [B, C], for inputs [B, D]."""
        placed = self._on(inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):
            return functional.linear(inputs.float(), placed["weight"], placed.get("bias"))

    def _decoded(self, rows: Mapping[str, Tensor]) -> Tensor:
        return self.logits(rows[self.form.feature])
