"""Quantise an exported float graph after training, by onnxruntime: layers, calibration, sensitivity, operators."""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import RecipeError, did_you_mean, needs_extra
from logitcache.runtime.console import errors_alone, track
from logitcache.shipping.exported import open_session
from logitcache.shipping.graph import INPUT, as_input, with_metadata
from logitcache.shipping.latency import Predict
from logitcache.shipping.metadata import Metadata

_PREFIX = "classifier.module."
_BATCH = 32
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "MatMulNBits", "QAttention")
_HEAVY = ("Conv", "Gemm", "MatMul")


def layers_of(data: bytes) -> dict[str, str]:
    """Return the operators of a graph that have weights, by the path of their module in the network."""
    import onnx

    graph = onnx.ModelProto.FromString(data).graph
    found = {}
    for node in graph.node:
        weights = [name for name in node.input[1:] if name.startswith(_PREFIX)]
        if node.op_type in _HEAVY and weights:
            found[weights[0].removeprefix(_PREFIX).rpartition(".")[0]] = node.name
    return found


def require_layers(names: Collection[str], layers: Collection[str]) -> None:
    """Raise RecipeError for a name that is no layer of the network."""
    for name in names:
        if name not in layers:
            raise RecipeError(
                f"--keep-float {name!r} is no layer with weights.{did_you_mean(name, layers)} Fix: one of "
                f"{', '.join(list(layers)[:12])}{', …' if len(layers) > 12 else ''}"
            )


class StaticQuantizer:
    """Quantise a float ONNX graph with calibration images, as QDQ: S8 weights by channel, U8 activations.

    `symmetric` activations are S8, with zero at 0.
    """

    def __init__(self, data: bytes, images: Tensor, metadata: Metadata, symmetric: bool = False) -> None:
        """Prepare a graph; images are uint8 [N, C, h, w]. Raises RecipeError for one that has nothing to quantise."""
        self._metadata, self._symmetric = metadata, symmetric
        self._batches = [{INPUT: as_input(batch, metadata.pixels).numpy()} for batch in torch.split(images, _BATCH)]
        self.layers = layers_of(data)
        if not self.layers:
            raise RecipeError(
                "the model cannot be quantised: its graph has no convolution and no linear layer with weights of its "
                f"own ({', '.join(sorted(_kinds(data)))}). Fix: `export` it in float"
            )
        with tempfile.TemporaryDirectory() as folder, _library() as library, errors_alone():
            source, prepared = Path(folder, "float.onnx"), Path(folder, "prepared.onnx")
            source.write_bytes(data)
            try:
                library.quant_pre_process(str(source), str(prepared))
            except Exception as cause:  # its steps raise anything
                raise RecipeError(
                    f"the model cannot be quantised: onnxruntime cannot infer its shapes ({str(cause)[:200]}). "
                    "Fix: another model, or `export` it in float"
                ) from cause
            self._prepared = prepared.read_bytes()

    def quantize(self, keep_float: Collection[str] = (), only: str | None = None) -> bytes:
        """Return the int8 file; layers of `keep_float` stay in float, or all but `only`."""
        import onnx

        nodes = {"nodes_to_exclude": [self.layers[name] for name in keep_float]}
        if only is not None:
            nodes = {"nodes_to_quantize": [self.layers[only]]}
        with tempfile.TemporaryDirectory() as folder, _library() as library, errors_alone():
            source, target = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
            source.write_bytes(self._prepared)
            library.quantize_static(
                str(source),
                str(target),
                library.reader(self._batches),
                quant_format=library.QuantFormat.QDQ,
                per_channel=True,
                activation_type=library.QuantType.QInt8 if self._symmetric else library.QuantType.QUInt8,
                weight_type=library.QuantType.QInt8,
                extra_options={"ActivationSymmetric": self._symmetric},
                **nodes,
            )
            model = onnx.ModelProto.FromString(target.read_bytes())
        del model.opset_import[:]
        model.opset_import.extend(
            entry
            for entry in onnx.ModelProto.FromString(self._prepared).opset_import
            if entry.domain in ("", "ai.onnx")
        )
        return with_metadata(model, self._metadata)


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer that alone is quantised, on the calibration images: mean squared error of logits, and equal answers."""

    layer: str
    error: float
    agreement: float


def measure_sensitivity(
    quantizer: StaticQuantizer,
    model: Callable[[bytes], Callable[..., Predict]],
    floating: bytes,
    images: Tensor,
) -> tuple[LayerSensitivity, ...]:
    """Quantise each layer of a float file alone and answer the images, uint8 [N, C, h, w]; the largest error first."""
    float_logits, rows = model(floating)()(images), []
    for layer in track(list(quantizer.layers), "sensitivity", len(quantizer.layers), "layers"):
        logits = model(quantizer.quantize(only=layer))()(images)
        agreement = (logits.argmax(dim=1) == float_logits.argmax(dim=1)).to(torch.float32).mean()
        rows.append(LayerSensitivity(layer, float((logits - float_logits).square().mean()), float(agreement)))
    return tuple(sorted(rows, key=lambda row: (-row.error, row.layer)))


def count_fused(data: bytes, who: str) -> dict[str, int]:
    """Count operators of the graph that onnxruntime makes of a file, those on integers, and layers left in float."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "optimized.onnx")
        open_session(data, 1, who, optimized=file)
        kinds = Counter(node.op_type for node in onnx.ModelProto.FromString(file.read_bytes()).graph.node)
    integer = sum(count for kind, count in kinds.items() if kind.startswith(_INTEGER))
    floating = sum(kinds[kind] for kind in (*_HEAVY, "FusedConv", "FusedMatMul", "FusedGemm"))
    return {"all": kinds.total(), "integer": integer, "float_layers": floating}


def _kinds(data: bytes) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.ModelProto.FromString(data).graph.node}


class _Library:
    """The functions of onnxruntime's quantisation."""

    def __init__(self) -> None:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,unused-ignore]
            def __init__(self, batches: list[dict[str, np.ndarray[Any, Any]]]) -> None:
                self._left = iter(batches)

            def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
                return next(self._left, None)

        self.quant_pre_process, self.quantize_static = quant_pre_process, quantization.quantize_static
        self.QuantFormat, self.QuantType, self.reader = quantization.QuantFormat, quantization.QuantType, Reader


@contextmanager
def _library() -> Iterator[_Library]:
    with needs_extra("quantisation", "export"):
        yield _Library()
