"""Read an exported ONNX file: its metadata, and a model that predicts; nothing of the file is run but its operators."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from logitcache.config.mistakes import first_mistake
from logitcache.errors import RecipeError, needs_extra
from logitcache.shipping.graph import as_input
from logitcache.shipping.metadata import KEY, Metadata
from logitcache.store.safe_files import open_regular
from logitcache.student.runs.trained import EvaluationTransform
from logitcache.views.augmentations.foreign import factories_of

_MOST_BYTES = 1 << 30
_MOST_NODES = 100_000
_MOST_VALUES = 1 << 26
"""Values of one tensor, for one image, that a graph may make."""
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_GROWING = frozenset(
    (
        "ConstantOfShape",
        "EyeLike",
        "Expand",
        "OneHot",
        "Pad",
        "RandomNormal",
        "RandomUniform",
        "Range",
        "Resize",
        "Tile",
    )
)
"""Operators whose output may be of any size: of these it must be known before they run."""


@dataclass(frozen=True)
class ExportedModel:
    """An exported model that was checked: uint8 pixels [B, C, h, w] in, logits [B, K] out, on the CPU."""

    path: Path
    data: bytes
    metadata: Metadata

    def session(self, threads: int = 0) -> "Session":
        """Open the model in onnxruntime; 0 threads are as many as there are cores."""
        return Session(open_session(self.data, threads, str(self.path)), self.metadata)

    @cached_property
    def transform(self) -> EvaluationTransform:
        """The transform of the run's evaluation, which brings an image to `shape`."""
        return EvaluationTransform(self.metadata.evaluation.augmentations, self.metadata.shape[0])


class Session(nn.Module):
    """A session of onnxruntime, as a module without parameters: uint8 pixels [B, C, h, w] in, logits [B, K] out."""

    def __init__(self, session: Any, metadata: Metadata) -> None:
        super().__init__()
        self.session, self.metadata = session, metadata

    def forward(self, pixels: Tensor) -> Tensor:
        """Predict on the CPU. Raises RecipeError for other shapes."""
        if tuple(pixels.shape[1:]) != self.metadata.shape:
            raise RecipeError(
                f"the exported model takes images {list(self.metadata.shape)}, not {list(pixels.shape[1:])}.\n"
                "  Fix: export the run again, at the size of these images"
            )
        images = as_input(pixels, self.metadata.pixels)
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(np.ascontiguousarray(logits))


def open_session(data: bytes, threads: int, who: str, optimized: Path | None = None) -> Any:
    """Open ONNX bytes in onnxruntime on the CPU; `optimized` names a file for the graph that it makes of them.

    Raises RecipeError for a graph that it refuses.
    """
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Threads that spin after a batch would slow what runs next, in this process or beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise unreadable(who, f"onnxruntime cannot open it ({str(error).splitlines()[0][:200]})") from error


def is_exported(path: str | Path) -> bool:
    """Return whether a path is that of an exported file, by its suffix, and not of a run."""
    path = Path(path).expanduser()
    return path.suffix in (".onnx", ".pt2") and not path.is_dir()


def open_exported(path: str | Path) -> ExportedModel:
    """Read a file that `export` or `quantize` wrote. Raises RecipeError for a broken, foreign or unsafe one."""
    path = Path(path).expanduser()
    if path.suffix == ".pt2":
        raise RecipeError(
            f"'{path}' is not read: files of torch.export can hold pickles, which run code.\n"
            "  Fix: export the run as ONNX; or torch.export.load, if you trust the file"
        )
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise unreadable(path, f"it has {size} bytes, at most {_MOST_BYTES} are read")
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(
            f"'{path}' cannot be read: {error.strerror}. Fix: name a file of `logitcache export`"
        ) from error
    model = _parsed(path, data)
    metadata = _metadata(path, model)
    for reason in _unsafe(model, metadata):
        raise unreadable(path, reason)
    return ExportedModel(path, data, metadata)


def unreadable(path: object, reason: str) -> RecipeError:
    """Return the error for a file that is not read."""
    return RecipeError(f"'{path}' is not read: {reason}.\n  Fix: export the run again, or copy the file again")


def _onnxruntime() -> Any:
    with needs_extra("an ONNX file", "export"):
        import onnxruntime
    return onnxruntime


def _parsed(path: Path, data: bytes) -> Any:
    with needs_extra("an ONNX file", "export"):
        from google.protobuf.message import DecodeError
        from onnx import ModelProto
    try:
        return ModelProto.FromString(data)
    except DecodeError as error:
        raise unreadable(path, "it is no ONNX file, or a damaged one") from error


def _metadata(path: Path, model: Any) -> Metadata:
    found = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if len(found) != 1:
        raise unreadable(path, "it has no metadata of logitcache: another program wrote it, or it is damaged")
    try:
        metadata = Metadata.model_validate_json(found[0])
    except ValidationError as error:
        raise unreadable(path, f"its metadata are wrong: {first_mistake(error)}") from error
    if unstated := factories_of(metadata.evaluation.augmentations):
        raise unreadable(path, f"it names the factory '{unstated[0]}', and what a file names is never called")
    return metadata


def _unsafe(model: Any, metadata: Metadata) -> Iterator[str]:
    """Yield why a graph is not run: other code or files, a size that is not bounded, another input or output."""
    graph = model.graph
    if model.functions or graph.sparse_initializer or model.training_info:
        yield "it has functions, sparse weights or training steps of its own"
    if len(graph.node) > _MOST_NODES:
        yield f"it has {len(graph.node)} operators, at most {_MOST_NODES} are run"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in _DOMAINS:
            yield f"its operator {node.op_type!a:.60} is of the library {node.domain!a:.60}"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs or attribute.sparse_tensors:
                yield f"its operator {node.op_type!a:.60} holds a graph of its own"
            tensors += [attribute.t, *attribute.tensors]
    if any(tensor.data_location or tensor.external_data for tensor in tensors):
        yield "its weights lie in other files"
    if len(graph.input) != 1 or len(graph.output) != 1:
        yield f"it has {len(graph.input)} inputs and {len(graph.output)} outputs, not one of each"
    kind = {"uint8": 2, "float": 1}[metadata.pixels]  # TensorProto.DataType
    images = graph.input[0].type.tensor_type
    if images.elem_type != kind or _sizes(images)[1:] != metadata.shape:
        yield f"it does not take the {metadata.pixels} images {list(metadata.shape)} of its metadata"
    if _sizes(graph.output[0].type.tensor_type)[1:] != (metadata.num_classes,):
        yield f"it does not predict the {metadata.num_classes} classes of its metadata"
    yield from _growing(model)


def _sizes(kind: Any) -> tuple[int | None, ...]:
    """Return the sizes of the axes of a tensor type; None for one that is not known."""
    return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim)


def _growing(model: Any) -> Iterator[str]:
    """Yield which tensor is too large for one image, or of a size that cannot be known before it is made."""
    from onnx.shape_inference import InferenceError, infer_shapes

    one = type(model)()
    one.CopyFrom(model)
    del one.graph.value_info[:]
    axis = one.graph.input[0].type.tensor_type.shape.dim[0]
    axis.Clear()
    axis.dim_value = 1
    try:
        graph = infer_shapes(one, strict_mode=True, data_prop=True).graph
    except (InferenceError, ValueError) as error:
        yield f"its operators do not fit together ({str(error).splitlines()[0][:200]})"
        return
    known = {value.name: _sizes(value.type.tensor_type) for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            sizes = known.get(name, (None,))
            if None in sizes and node.op_type in _GROWING:
                yield f"the size of what its operator {node.op_type} makes is not known"
            count = float(np.prod([float(size or 1) for size in sizes]))
            if count > _MOST_VALUES:
                yield f"its operator {node.op_type!a:.60} makes {count:.3g} values, at most {_MOST_VALUES} are made"
