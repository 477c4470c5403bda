"""Compare the types and shapes of a checkpoint with the learner's before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_SLACK = 64 << 20
_MOST_TIMES = 8
"""A state at any step over the learner's first one, which has no moments of an optimiser yet, at most."""


def most_state_bytes(own: object) -> int:
    """Return how many bytes a saved state can have, given the learner's own before its first step."""
    return _SLACK + _MOST_TIMES * _num_bytes(own)


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_bytes, items))


def require_alike(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first entry of a saved state that is of another kind than the learner's own.

    Entries of only one of them, other shapes and other lengths are left to the loading.
    """
    ranks = saved.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise ValueError("ranks is no list of states")
    whole = {name: value for name, value in own.items() if name != "ranks"}
    _require(saved, whole, "")
    for rank in ranks:
        _require(rank, own["ranks"][0], "ranks")
    _require_moments(saved["optimizer"])


def require_position(place: Sequence[int], num_batches: int, epochs: int) -> None:
    """Raise ValueError for a step, epoch and batch that a run of so many epochs does not reach."""
    reached = len(place) == 3 and all(
        found <= most for found, most in zip(place, (epochs * num_batches, epochs, num_batches), strict=True)
    )
    _check(reached, "place", place, f"a step, epoch and batch within {epochs} epochs of {num_batches} batches")


def _require(found: Any, own: Any, key: str) -> None:
    if isinstance(own, Tensor):
        _check(isinstance(found, Tensor) and found.dtype == own.dtype, key, found, f"a tensor of {own.dtype}")
    elif isinstance(own, Mapping):
        _check(isinstance(found, Mapping), key, found, "a mapping")
        for name in own.keys() & found.keys():
            _require(found[name], own[name], f"{key}.{name}".lstrip("."))
    elif isinstance(own, list | tuple):
        _check(isinstance(found, list | tuple), key, found, "a list")
        for one, other in zip(found, own, strict=False):
            _require(one, other, key)
    elif isinstance(own, bool):
        _check(isinstance(found, bool), key, found, "true or false")
    elif isinstance(own, int | float):
        kinds = (int, float) if isinstance(own, float) else (int,)
        _check(type(found) in kinds and found >= 0 and math.isfinite(found), key, found, "a number, 0 or more")


def _require_moments(optimizer: Mapping[str, Any]) -> None:
    moments = optimizer.get("state")
    _check(isinstance(moments, Mapping), "optimizer.state", moments, "a mapping")
    assert isinstance(moments, Mapping)
    for number, kept in moments.items():
        key = f"optimizer.state.{number}"
        _check(isinstance(kept, Mapping), key, kept, "a mapping")
        for name, value in kept.items():
            is_floats = isinstance(value, Tensor) and value.is_floating_point()
            _check(is_floats or value is None, f"{key}.{name}", value, "floating-point numbers")


def require_shapes(optimizer: Optimizer) -> None:
    """Raise ValueError unless what a loaded optimiser keeps of each parameter has its shape, or is one number."""
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            fits = value is None or tuple(value.shape) in (parameter.shape, ())
            _check(fits, f"optimizer.state, {name}", value, f"of shape {list(parameter.shape)}")


def _check(holds: bool, key: str, found: object, wanted: str) -> None:
    if not holds:
        shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
        raise ValueError(f"{key or 'the state'} is {shown}, not {wanted}")
