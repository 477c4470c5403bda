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


def torch_untouched() -> contextlib.AbstractContextManager[None]:
    """Restore torch's generators on leaving, in a hundredth of the time that numpy's takes."""
    # torch.manual_seed reaches the generators of every device, even if only a CPU draw follows.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(range(torch.cuda.device_count()) if in_use else ())


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
