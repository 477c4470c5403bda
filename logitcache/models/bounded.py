"""Build a network that a file describes only if it is no larger than the weights beside it."""

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from logitcache.runtime.device import own_randomness
from logitcache.store.safe_files import require_bounded

_MAX_HEADER_BYTES = 16 << 20
_SLACK_VALUES = 1 << 24  # buffers that a network computes are in no file
_TIMES = 4
_MODULES_PER_TENSOR, _SLACK_MODULES = 32, 512


class TooLarge(Exception):
    """A description builds more than its weights; no ValueError, which builders of models catch."""


class Held(NamedTuple):
    """The number of tensors in a file of weights, and of all their values."""

    num_tensors: int
    num_values: int


def held_in(weights: Path) -> Held:
    """Read the header of a safetensors file. Raises OSError, or ValueError with the reason."""
    size = require_bounded(weights, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with open(weights, "rb") as file:
        start = file.read(8)
    if len(start) < 8 or struct.unpack("<Q", start)[0] > min(size, _MAX_HEADER_BYTES):
        raise ValueError("it has no header of safetensors")
    try:
        with safe_open(weights, framework="pt") as tensors:
            shapes = [torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it cannot be read as safetensors: {error}") from error
    return Held(len(shapes), sum(shape.numel() for shape in shapes))


def require_buildable(build: Callable[[], object], held: Held, times: int) -> None:
    """Build a network without values; raise TooLarge as soon as it exceeds so many times what its weights hold.

    Constructors that compute with values are run on the CPU, within the same bounds.
    """
    for device in ("meta", "cpu"):
        try:
            with own_randomness(torch.device("cpu"), 0), torch.device(device), _at_most(held, times):
                build()
        except TooLarge:
            raise
        except (RuntimeError, ValueError, TypeError, OverflowError, ArithmeticError, LookupError):
            continue  # the real construction reports what is wrong
        return


@contextmanager
def _at_most(held: Held, times: int) -> Iterator[None]:
    """Raise TooLarge if the modules that this thread makes in the block exceed the contents of a file."""
    values = times * held.num_values + _SLACK_VALUES
    modules = _MODULES_PER_TENSOR * held.num_tensors + _SLACK_MODULES
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, value: Tensor | nn.Module | None) -> None:
        nonlocal values, modules
        if threading.get_ident() != thread:
            return
        values -= value.numel() if isinstance(value, Tensor) else 0
        modules -= isinstance(value, nn.Module)
        if min(values, modules) < 0:
            what = f"{name} {list(value.shape)}" if isinstance(value, Tensor) else f"one more {type(value).__name__}"
            raise TooLarge(f"with {what} it exceeds the {held.num_values} values in {held.num_tensors} tensors")

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_used(module: nn.Module, held: Held) -> None:
    """Raise TooLarge if a file holds far more values than a network takes, before they are read."""
    used = sum(value.numel() for value in module.state_dict().values() if isinstance(value, Tensor))
    if held.num_values > _TIMES * used + _SLACK_VALUES:
        raise TooLarge(f"its network takes {used} values, {held.num_values} are in the file")
