"""List the modules of teachers that features could tap, with the bytes that they would take."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitcache.cache.format.manifest import LOGITS
from logitcache.models import AnswersByKey
from logitcache.models.taps.layouts import TapLayout, known_layouts
from logitcache.reductions import ChannelLayout, channels_in_place
from logitcache.runtime.device import autocast, to_device
from logitcache.teacher.teacher import Teacher

DIMENSIONS = (2, 3, 4)
"""Of vectors [B, C], tokens [B, N, D] and maps [B, C, H, W]."""


class _Call(NamedTuple):
    """One call of a module: its output, how often that had been changed in place, and whether it is the input."""

    path: str
    module: str
    output: Any
    version: int
    is_input: bool


class _Tap(NamedTuple):
    """A module or a column, the shape of its output without the batch, and where its channels are, if known."""

    path: str
    module: str
    shape: tuple[int, ...]
    layout: ChannelLayout | None


def candidate_taps(teachers: Sequence[Teacher], pixels: Tensor, num_rows: int) -> list[dict[str, Any]]:
    """List every module that a feature can tap, by teacher, the last to answer uint8 pixels [B, C, H, W] first.

    Bytes are those in float16, not compressed; None of pooled features if the axis of the channels is not known.

    Modules that run twice or never are left out, as are those that return their input unchanged (identities, dropout)
    and those whose output is no tensor of vectors, tokens or maps for each image, or is changed in place afterwards. Of
    nested modules that return the same tensor the outermost is listed.
    """
    return [row for teacher in teachers for row in _taps_of(teacher, pixels, num_rows)]


def _taps_of(teacher: Teacher, pixels: Tensor, num_rows: int) -> list[dict[str, Any]]:
    network, rows = teacher.classifier.module, []
    found = _columns(network) if isinstance(network, AnswersByKey) else _modules(teacher, network, pixels)
    for path, module, own, layout in found:
        shape = channels_in_place(torch.empty(1, *own, device="meta"), layout or "auto").shape[1:]
        maps = 2 * shape.numel()
        pooled = None if layout is None else 2 * shape[-1 if len(shape) == 2 else 0]
        rows.append(
            {
                "teacher": teacher.name,
                "tap": path,
                "module": module,
                "shape": list(shape),
                "pooled_row_bytes": pooled,
                "maps_row_bytes": maps,
                "pooled_bytes": None if pooled is None else pooled * num_rows,
                "maps_bytes": maps * num_rows,
            }
        )
    return rows


def _columns(answers: AnswersByKey) -> list[_Tap]:
    """List the features that files of answers hold."""
    return [_Tap(name, "column", shape, "auto") for name, shape in answers.shapes.items() if name != LOGITS]


def _modules(teacher: Teacher, network: nn.Module, pixels: Tensor) -> list[_Tap]:
    """List the modules of a network whose outputs can be tapped, the last first."""
    with torch.no_grad(), autocast(teacher.device, teacher.precision):
        inputs = teacher.classifier.normalize(to_device(pixels, teacher.device))
        calls = _tappable(network, inputs)
        asked = [TapLayout(call.path) for call in calls]
        known = known_layouts(network, inputs, asked, f"teacher {teacher.name!r}")
    return [_Tap(call.path, call.module, *one) for call, one in zip(calls, known, strict=True)]


def _tappable(network: nn.Module, inputs: Tensor) -> list[_Call]:
    """Run a network once; return the calls whose outputs can be tapped, the last first."""
    calls: list[_Call] = []
    paths = {module: path for path, module in network.named_modules() if path}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else 0
        is_input = _returns_input(module, args, output)
        calls.append(_Call(paths[module], type(module).__name__, output, version, is_input))

    with ExitStack() as hooks:
        for module in paths:
            hooks.callback(module.register_forward_hook(note).remove)
        network(inputs)
    times = Counter(call.path for call in calls)
    # An outer module returns after the modules inside it, and takes their place.
    found = {
        id(call.output): call
        for call in calls
        if times[call.path] == 1 and not call.is_input and _is_feature(call, len(inputs))
    }
    return list(reversed(found.values()))


def _returns_input(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Return whether a module without children returns its input unchanged."""
    if not isinstance(output, Tensor) or next(module.children(), None) is not None or getattr(module, "inplace", False):
        return False
    same = (one for one in inputs if isinstance(one, Tensor) and one.shape == output.shape)
    return any(one.data_ptr() == output.data_ptr() for one in same)


def _is_feature(call: _Call, count: int) -> bool:
    """Return whether an output has a floating-point row for each image, and is not changed in place afterwards."""
    value = call.output
    if not isinstance(value, Tensor) or value.ndim not in DIMENSIONS or len(value) != count:
        return False
    return value.is_floating_point() and bool(value._version == call.version)
