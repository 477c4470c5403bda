"""Devices: choose one, feed it, time it, and seed its generators."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from logitcache.errors import RecipeError

Precision = Literal["float32", "bfloat16", "float16"]
ChannelsLast = Annotated[
    Literal["auto"] | bool,
    Field(
        description="Whether images and weights are in channels-last memory format. `auto`: on a CPU, and on CUDA "
        "under autocast, if the model has 2-D convolutions and its outputs do not change beyond rounding; the run "
        "records the choice.",
    ),
]


def num_cores() -> int:
    """Return the number of cores that this process may use; of all where the system does not know, as on macOS."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" or "mps" into an available device.

    "auto" takes the first CUDA device, else MPS, else the CPU. Of several processes that torchrun started on a machine
    each has its own CUDA device. Raises RecipeError if the device is unknown or absent.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_cuda_device("auto", None)
        return torch.device("mps" if torch.backends.mps.is_available() and _num_local() == 1 else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device '{name}' is unknown.\n  Fix: use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda":
        return _own_cuda_device(name, device.index)
    if device.type != "mps" and device != torch.device("cpu"):
        raise RecipeError(f"device '{name}' is not supported.\n  Fix: use auto, cpu, cuda or mps.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError(f"device '{name}' is not available here.\n  Fix: device: auto.")
    return device


def _num_local() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _own_cuda_device(name: str, index: int | None) -> torch.device:
    if _num_local() > 1:
        if index is not None:
            raise RecipeError(
                f"device '{name}' is one for {_num_local()} processes.\n  Fix: device: cuda gives each its own."
            )
        index = int(os.environ["LOCAL_RANK"])
        name = f"cuda:{index}"
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (index or 0) >= num_devices:
        raise RecipeError(
            f"device '{name}' is not available: this machine shows {num_devices} CUDA devices.\n"
            "  Fix: device: auto takes the best one."
        )
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def distributed_backend() -> str:
    """Name the backends of torch.distributed: NCCL for tensors on CUDA devices, gloo for those on the CPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def make_current(device: torch.device) -> None:
    """Make a CUDA device the default one, which page-locking uses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Run a forward pass in a lower precision; float32 changes nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def grad_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Return a gradient scaler, which acts only in float16: the others have the range."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Page-lock a CPU tensor bound for a CUDA device, so that its copy can overlap with compute."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; from pinned memory to CUDA the copy does not wait.

    Never asynchronous towards the CPU: its bytes would be read before they arrive.
    """
    return pin(tensor, device).to(device, non_blocking=device.type == "cuda")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, as a timing needs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that work on a device draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Restore states of `random_states`; the state of a device of another type is left out."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


class OwnRandomness:
    """Random states of one model: each block continues from the states that the previous block left.

    Blocks are not nested.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device, self._before = device, dict[str, Tensor]()
        with own_randomness(device, seed):
            self._states = random_states(device)

    def __enter__(self) -> None:
        assert not self._before, "blocks are not nested"
        self._before = random_states(self._device)
        set_random_states(self._device, self._states)

    def __exit__(self, *_: object) -> None:
        self._states = random_states(self._device)
        set_random_states(self._device, self._before)
        self._before = {}


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of one device for a block; the caller's states are put back."""
    before = random_states(device)
    try:
        seed_generators(device, seed)
        yield
    finally:
        set_random_states(device, before)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of one device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
