"""Which layers cost accuracy when they alone are quantised."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.runtime.console import track
from logitcache.shipping.latency import Predict
from logitcache.shipping.static_quantizer import StaticQuantizer


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer that alone is quantised, on the calibration images: mean squared error of logits, and equal answers."""

    layer: str
    error: float
    agreement: float


def measure_sensitivity(
    quantizer: StaticQuantizer,
    predictor: Callable[[bytes], Predict],
    float_logits: Tensor,
    images: Tensor,
) -> tuple[LayerSensitivity, ...]:
    """Quantise each layer alone and answer the images, uint8 [N, C, h, w]; the largest error first."""
    rows = []
    for layer in track(list(quantizer.layers), "sensitivity", len(quantizer.layers), "layers"):
        logits = predictor(quantizer.quantize(only=layer))(images)
        agreement = (logits.argmax(dim=1) == float_logits.argmax(dim=1)).to(torch.float32).mean()
        rows.append(LayerSensitivity(layer, float((logits - float_logits).square().mean()), float(agreement)))
    return tuple(sorted(rows, key=lambda row: (-row.error, row.layer)))
