"""Count what a network computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.no_grad()
def flops_of(module: nn.Module, images: Tensor) -> int:
    """Return the floating-point operations of a forward pass in evaluation mode, as torch's FlopCounterMode counts.

    Convolutions, matrix products and attention count; a multiplication and its addition are two operations.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    module.eval()
    with _countable(), FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops())


@contextmanager
def _countable() -> Iterator[None]:
    """Keep torch from kernels of whole attention layers, which the counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
