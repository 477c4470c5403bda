"""Turn a classifier into a graph of operators: a program of torch.export, and an ONNX file."""

import io
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from logitcache.errors import RecipeError, needs_extra
from logitcache.models import Classifier
from logitcache.shipping.metadata import KEY, Metadata, PixelType

INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
AS_RECORDED = ("device=cpu", "channels_last=false")
"""Overrides of a run whose network is recorded: in another memory format torch.export has other operators."""
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)|torch\.ops\.([\w.]+)")
_TORCH = str(Path(torch.__file__).parent)


class PixelsToLogits(nn.Module):
    """A classifier as it is shipped: pixels of one size in, logits out, with nothing to check at run time."""

    def __init__(self, classifier: Classifier, pixels: PixelType) -> None:
        super().__init__()
        self.classifier, self._pixels = classifier, pixels
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels, or float ones of 0 to 1, [B, C, h, w], and predict."""
        values = pixels.to(torch.float32) if self._pixels == "uint8" else pixels * 255
        return self.classifier.checked(self.classifier.module(self.classifier.scale(values)))


def example(shape: tuple[int, ...], pixels: PixelType) -> Tensor:
    """Return two black images for a graph that takes `shape` [C, h, w]."""
    return torch.zeros((2, *shape), dtype=torch.uint8 if pixels == "uint8" else torch.float32)


def as_input(images: Tensor, pixels: PixelType) -> Tensor:
    """Turn uint8 pixels into what a graph takes."""
    return images if pixels == "uint8" else images.to(torch.float32) / 255


def record(module: nn.Module, images: Tensor) -> ExportedProgram:
    """Record a module for batches of any size. Raises RecipeError naming the operation that cannot be recorded."""
    try:
        with torch.no_grad():
            return torch.export.export(module, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except Exception as cause:  # the model's own code runs
        raise RecipeError(
            f"the model cannot be exported: torch.export cannot record {_line_of(cause)}: {_first_line(cause)}.\n"
            "  Fix: write that operation without control flow on values and for batches of any size, or another model"
        ) from cause


def to_onnx(program: ExportedProgram, metadata: Metadata) -> bytes:
    """Convert a program to an ONNX file with metadata. Raises RecipeError naming the operator that ONNX lacks."""
    with needs_extra("export to ONNX", "export"):
        import onnxscript  # noqa: F401  # torch.onnx needs it
        from onnx import ModelProto
    try:
        found = torch.onnx.export(
            program, (), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False, optimize=True
        )
        assert found is not None
        model = found.model_proto
        assert isinstance(model, ModelProto)
    except (torch.onnx.OnnxExporterError, ValueError) as cause:
        raise RecipeError(
            f"the model cannot be exported: ONNX has no {_operator_of(cause)}.\n"
            "  Fix: --format pt2, or a model without that operator"
        ) from cause
    return with_metadata(_plain(model), metadata)


def to_pt2(program: ExportedProgram, metadata: Metadata) -> bytes:
    """Write a program in torch.export's own format, with metadata as an extra file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{KEY}.json": metadata.model_dump_json()})
    return buffer.getvalue()


def with_metadata(model: Any, metadata: Metadata) -> bytes:
    """Return the bytes of an ONNX model with the entry of metadata, which replaces an older one."""
    del model.metadata_props[:]
    model.metadata_props.add(key=KEY, value=metadata.model_dump_json())
    model.producer_name = "logitcache"
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _plain(model: Any) -> Any:
    """Leave out what the exporter notes about the code (paths of this machine among it); name the batch axis."""
    graph = model.graph
    for named in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del named.metadata_props[:]
        named.doc_string = ""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    return model


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the innermost last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")[:300]


def _line_of(error: BaseException) -> str:
    """Return the innermost line outside torch that an error passed through."""
    frames = [frame for cause in _causes(error) for frame in traceback.extract_tb(cause.__traceback__)]
    own = [frame for frame in frames if not frame.filename.startswith((_TORCH, __file__, "<"))]
    return f"`{own[-1].line}` ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else "it"


def _operator_of(error: BaseException) -> str:
    """Return the operator that a converter of torch.onnx found no function for; else the error's own words."""
    for cause in reversed(list(_causes(error))):
        if match := _OPERATOR.search(str(cause)):
            name = f"{match[1]}.{match[2]}" if match[1] else match[3]
            return f"operator for {name}"
    return f"form for it ({_first_line(error)})"
