"""Random state: reading a data set leaves every global generator as it was."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch on leaving."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch_untouched():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextlib.contextmanager
def torch_untouched() -> Iterator[None]:
    """Restore torch's generators, in a hundredth of the time that numpy's takes."""
    host = torch.default_generator.get_state()
    # torch.manual_seed reaches the generators of every device, even if only a CPU draw follows.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if in_use else None
    try:
        yield
    finally:
        torch.default_generator.set_state(host)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def elsewhere(seed: int) -> Iterator[None]:
    """Put the global generators in another state for a while."""
    with untouched():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


def position() -> tuple[int, int]:
    """Return where Python's and numpy's global generators stand; a draw moves it."""
    with untouched():
        return random.getrandbits(64), int(np.random.randint(2**62))
