"""What may be tapped in a teacher: its modules, and the shape of what each puts out."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitcache.models.layouts import TapLayout, known_layouts
from logitcache.reductions import Layout, channels_in_place
from logitcache.runtime.device import autocast, to_device
from logitcache.teacher.teacher import Teacher

DIMENSIONS = (2, 3, 4)
"""Of vectors [B, C], tokens [B, N, D] and maps [B, C, H, W]."""


class Candidate(NamedTuple):
    """A module's path, as a tap names it, its class, and the shape of its output without the batch.

    `shape` is that of the feature, [C, H, W], [N, D] or [C], if `layout` is known; None leaves it as the module has it.
    """

    tap: str
    module: str
    shape: tuple[int, ...]
    layout: Layout | None = None

    @property
    def num_channels(self) -> int | None:
        """Numbers that are left of it pooled; None if the layout is not known."""
        if self.layout is None:
            return None
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]


class _Fired(NamedTuple):
    """A module's output, how often that had been changed in place by then, and whether it is the module's own input."""

    path: str
    module: str
    value: Any
    version: int
    is_input: bool


def candidates(teacher: Teacher, pixels: Tensor) -> list[Candidate]:
    """List every module that a feature can tap, the last to answer uint8 pixels [B, C, H, W] first.

    Modules that run twice or never are left out, as are those that return their input unchanged (identities, dropout)
    and those whose output is no tensor of vectors, tokens or maps for each image, or is changed in place afterwards. Of
    nested modules that return the same tensor the outermost is listed.
    """
    network, fired = teacher.classifier.module, list[_Fired]()
    with ExitStack() as hooks, torch.no_grad(), autocast(teacher.device, teacher.precision):
        for path, module in network.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(_note(fired, path)).remove)
        inputs = teacher.classifier.normalize(to_device(pixels, teacher.device))
        network(inputs)
    times = Counter(one.path for one in fired)
    found: dict[int, Candidate] = {}
    for one in fired:
        if times[one.path] == 1 and not one.is_input and _is_tappable(one, len(pixels)):
            # An outer module returns after the modules inside it.
            found[id(one.value)] = Candidate(one.path, one.module, tuple(one.value.shape[1:]))
    return _in_place(teacher, inputs, list(reversed(found.values())))


def _in_place(teacher: Teacher, inputs: Tensor, found: list[Candidate]) -> list[Candidate]:
    """Return candidates with their channels where features have them."""
    with torch.no_grad(), autocast(teacher.device, teacher.precision):
        network, asked = teacher.classifier.module, [TapLayout(one.tap) for one in found]
        layouts = [known.layout for known in known_layouts(network, inputs, asked, f"teacher {teacher.name!r}")]
    placed = []
    for one, layout in zip(found, layouts, strict=True):
        shape = channels_in_place(torch.empty(1, *one.shape, device="meta"), layout or "auto").shape[1:]
        placed.append(one._replace(shape=tuple(shape), layout=layout))
    return placed


def _note(fired: list[_Fired], path: str) -> Callable[[Any, Any, Any], None]:
    def note(module: Any, inputs: Any, output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else 0
        fired.append(_Fired(path, type(module).__name__, output, version, _returns_input(module, inputs, output)))

    return note


def _returns_input(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a module without children returns its input as it is; what changes it in place computes something."""
    if not isinstance(output, Tensor) or next(module.children(), None) is not None or getattr(module, "inplace", False):
        return False
    same = (one for one in inputs if isinstance(one, Tensor) and one.shape == output.shape)
    return any(one.data_ptr() == output.data_ptr() for one in same)


def _is_tappable(one: _Fired, count: int) -> bool:
    value = one.value
    if not isinstance(value, Tensor) or value.ndim not in DIMENSIONS or len(value) != count:
        return False
    return value.is_floating_point() and bool(value._version == one.version)
