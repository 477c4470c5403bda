"""Whole numbers in fewer than eight bits each."""

import torch
from torch import Tensor


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Pack integers 0..2^width - 1, [B, n], into uint8 [B, ceil(n·width / 8)]; the lowest bit comes first."""
    bits = (values.long()[:, :, None] >> torch.arange(width, device=values.device)) & 1
    bits = torch.nn.functional.pad(bits.flatten(1), (0, -values.shape[1] * width % 8)).view(len(values), -1, 8)
    return (bits << torch.arange(8, device=values.device)).sum(dim=2).to(torch.uint8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Return the `count` integers, int64 [B, count], that `pack_bits` packed."""
    bits = (packed.long()[:, :, None] >> torch.arange(8, device=packed.device)) & 1
    bits = bits.flatten(1)[:, : count * width].view(len(packed), count, width)
    return (bits << torch.arange(width, device=packed.device)).sum(dim=2)


def pack_pairs(values: Tensor) -> Tensor:
    """Pack integers -8..7, [B, n], two to a byte, into uint8 [B, ceil(n / 2)]; a pair of zeros is the byte 0."""
    even = torch.nn.functional.pad(values.to(torch.int16), (0, values.shape[1] % 2)) & 15
    return (even[:, 0::2] | even[:, 1::2] << 4).to(torch.uint8)


def unpack_pairs(packed: Tensor, count: int) -> Tensor:
    """Return the `count` integers, int16 [B, count], that `pack_pairs` packed."""
    wide = packed.to(torch.int16)
    both = torch.stack([wide & 15, wide >> 4], dim=2).flatten(1)[:, :count]
    return both - 16 * (both > 7)
