"""Quantise a finished run to an int8 ONNX file, compare it with the run, and time it against the float file."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.models import Classifier
from logitcache.models.quantization.fake_quantization import calibrate, imitate_int8, to_int8
from logitcache.shipping.elsewhere import Elsewhere, commands_elsewhere
from logitcache.shipping.export import describe
from logitcache.shipping.exported import ExportedModel, Session
from logitcache.shipping.graph import AS_RECORDED, PixelsToLogits, example, record, to_onnx
from logitcache.shipping.latency import FileLatency, file_latencies, warn_if_slow
from logitcache.shipping.metadata import Metadata, PixelType, new_file, record_of, write_with_record
from logitcache.shipping.parity import LEAST_INT8_AGREEMENT, Parity, compare
from logitcache.shipping.quantization.calibration import calibration_images
from logitcache.shipping.quantization.static_quantizer import (
    LayerSensitivity,
    StaticQuantizer,
    count_fused,
    measure_sensitivity,
    require_layers,
)
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.evaluation.open_run import open_run

_BATCH = 32
Method = Literal["onnxruntime", "pt2e"]


@dataclass(frozen=True)
class QuantizeResult:
    """An int8 file and its record: bytes of the float file and of this one, and how it compares with the float run.

    `operators` are those of the graph that onnxruntime makes of it: all, those on integers, and layers with weights
    that stayed in float. `keep_float` are layers that were kept so. `elsewhere` are commands for other runtimes.
    """

    run: str
    file: str
    record: str
    pixels: PixelType
    calibration_images: int
    keep_float: tuple[str, ...]
    float_bytes: int
    bytes: int
    operators: dict[str, int]
    parity: Parity
    latencies: tuple[FileLatency, ...]
    sensitivity: tuple[LayerSensitivity, ...]
    elsewhere: tuple[Elsewhere, ...]


def quantize(
    run: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    pixels: PixelType = "uint8",
    method: Method = "onnxruntime",
    symmetric: bool = False,
    num_images: int = 256,
    keep_float: Sequence[str] = (),
    keep_worst: int = 0,
    sensitivity: bool = False,
    least_agreement: float = LEAST_INT8_AGREEMENT,
    overwrite: bool = False,
    latency: LatencyPlan | None = None,
) -> QuantizeResult:
    """Quantise a finished run after training, to `out`, by default RUN/model.int8.onnx.

    Activations are calibrated on `num_images` unaugmented images of the run's data. Layers of `keep_float`, and the
    `keep_worst` ones whose quantisation alone changes the logits most, stay in float. `method` is onnxruntime's
    `quantize_static` or torchao's PT2E (extra `quant`). `symmetric` (only with quantize_static) makes activations
    signed with zero point 0, as TensorRT requires. Raises RecipeError for a model that cannot be quantised, and
    MismatchError, without writing, if less than the share `least_agreement` of predictions equal the float run's.
    """
    if symmetric and method == "pt2e":
        raise RecipeError("PT2E makes no symmetric activations. Fix: --method onnxruntime, or leave out --symmetric")
    run = Path(run)
    file = new_file(run / "model.int8.onnx" if out is None else out, overwrite)
    opened = open_run(run, [*overrides, *AS_RECORDED])
    metadata = describe(run, opened, pixels, "int8")
    images = calibration_images(run, opened.recipe, metadata, num_images, overrides)
    _require_finite(run, opened.classifier, images)
    floating = _graph(opened.classifier, metadata.model_copy(update={"arithmetic": "float32"}))
    quantizer = StaticQuantizer(floating, images, metadata, symmetric)
    require_layers(keep_float, quantizer.layers)
    model = partial(_model, file, metadata)
    rows = measure_sensitivity(quantizer, model, floating, images) if sensitivity or keep_worst else ()
    kept = tuple(dict.fromkeys([*keep_float, *(row.layer for row in rows[:keep_worst])]))
    data = quantizer.quantize(kept) if method == "onnxruntime" else _by_pt2e(opened.classifier, images, kept, metadata)
    parity = compare(opened.classifier, model(data)(), opened.validator)
    parity.require_agreement(f"'{file}'", least_agreement)
    turns = file_latencies(model(floating), model(data), opened.validator.sample()[0], latency) if latency else ()
    result = QuantizeResult(
        run=str(run),
        file=str(file),
        record=str(record_of(file)),
        pixels=pixels,
        calibration_images=len(images),
        keep_float=kept,
        float_bytes=len(floating),
        bytes=len(data),
        operators=count_fused(data, str(file)),
        parity=parity,
        latencies=tuple(turns),
        sensitivity=rows,
        elsewhere=commands_elsewhere(file, metadata, symmetric),
    )
    warn_if_slow(result.file, result.operators["float_layers"] - len(kept), result.latencies)
    write_with_record(file, data, asdict(result), metadata)
    return result


@torch.no_grad()
def _require_finite(run: Path, classifier: Classifier, images: Tensor) -> None:
    """Raise RecipeError if a network answers NaN or infinity: its activations have no range."""
    if not all(classifier(batch).isfinite().all() for batch in torch.split(images, _BATCH)):
        raise RecipeError(f"{run} answers NaN or infinity to images of its own. Fix: train it again, or copy it again")


def _by_pt2e(classifier: Classifier, images: Tensor, keep_float: Sequence[str], metadata: Metadata) -> bytes:
    """Quantise by torchao's PT2E: the network that imitates int8, calibrated and not trained."""
    batches = [classifier.normalize(batch) for batch in torch.split(images, _BATCH)]
    height, width = batches[0].shape[2:]
    network = imitate_int8(classifier.module, metadata.shape[0], (height, width), keep_float)
    calibrate(network, batches)
    shipped = Classifier(to_int8(network), classifier.preprocessing)
    return _graph(shipped, metadata)


def _graph(classifier: Classifier, metadata: Metadata) -> bytes:
    """Return a network as an ONNX file."""
    pixels = metadata.pixels
    return to_onnx(record(PixelsToLogits(classifier, pixels), example(metadata.shape, pixels)), metadata)


def _model(file: Path, metadata: Metadata, data: bytes) -> Callable[..., Session]:
    """Return what opens a session for a number of threads."""
    return ExportedModel(file, data, metadata).session
