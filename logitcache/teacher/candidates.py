"""What may be tapped in a teacher: its modules, and the shape of what each puts out."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitcache.device import autocast, to_device
from logitcache.teacher.models import Teacher

DIMENSIONS = (2, 3, 4)
"""Of vectors [B, C], tokens [B, N, D] and maps [B, C, H, W]."""


class Candidate(NamedTuple):
    """A module's path, as a tap names it, its class, and the shape of its output without the batch."""

    tap: str
    module: str
    shape: tuple[int, ...]


class _Fired(NamedTuple):
    """A module, what it put out, and how often that had been changed in place by then."""

    path: str
    module: str
    value: Any
    version: int


def candidates(teacher: Teacher, pixels: Tensor) -> list[Candidate]:
    """List every module that a feature can tap, in the order in which they answer uint8 pixels [B, C, H, W].

    Left out are modules that run twice or never, and those whose output is no tensor of vectors, tokens or maps for
    each image, or is changed in place afterwards. Of modules that put out the same the outermost is listed.
    """
    network, fired = teacher.classifier.module, list[_Fired]()
    with ExitStack() as hooks, torch.no_grad(), autocast(teacher.device, teacher.precision):
        for path, module in network.named_modules():
            if path:
                hooks.callback(module.register_forward_hook(_note(fired, path)).remove)
        network(teacher.classifier.normalize(to_device(pixels, teacher.device)))
    times = Counter(one.path for one in fired)
    found: dict[int, Candidate] = {}
    for one in fired:
        if times[one.path] == 1 and _is_tappable(one, len(pixels)):
            # What is outside answers later than what is inside it.
            found[id(one.value)] = Candidate(one.path, one.module, tuple(one.value.shape[1:]))
    return list(found.values())


def _note(fired: list[_Fired], path: str) -> Callable[[Any, Any, Any], None]:
    def note(module: Any, inputs: Any, output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else 0
        fired.append(_Fired(path, type(module).__name__, output, version))

    return note


def _is_tappable(one: _Fired, count: int) -> bool:
    value = one.value
    if not isinstance(value, Tensor) or value.ndim not in DIMENSIONS or len(value) != count:
        return False
    return value.is_floating_point() and bool(value._version == one.version)
