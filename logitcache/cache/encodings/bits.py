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


def pack_digits(values: Tensor, base: int, each: int) -> Tensor:
    """Pack integers [B, n], each modulo `base`, as `each` digits of a byte, into uint8 [B, ceil(n / each)].

    The first digit counts ones; bytes are filled up with zeros.
    """
    digits = torch.nn.functional.pad(values.to(torch.int16), (0, -values.shape[1] % each)).remainder(base)
    places = base ** torch.arange(each, dtype=torch.int16, device=values.device)
    return (digits.view(len(values), -1, each) * places).sum(dim=2).to(torch.uint8)


def unpack_digits(packed: Tensor, base: int, each: int, count: int) -> Tensor:
    """Return the `count` integers, int16 [B, count], that `pack_digits` packed: from -base/2, less than base/2."""
    places = base ** torch.arange(each, dtype=torch.int16, device=packed.device)
    digits = (packed.to(torch.int16)[:, :, None] // places % base).flatten(1)[:, :count]
    return digits - base * (digits >= (base + 1) // 2)
