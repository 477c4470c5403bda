"""Every logit, in one byte."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from logitcache.cache.encodings.base import Plain, RowArray
from logitcache.cache.format.arrays import Storage
from logitcache.logits import CompactLogits, Logits

LEVELS = 255


class UInt8(Plain):
    """All C logits of a row in equal steps from its smallest to its largest, in C + 4 bytes; the error is at most half
    a step.

    Half a step is (max - min) / 510, with the extremes of the row.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logits", "raw logits"})

    kind: Literal["uint8"] = "uint8"
    storage: Storage = "hot"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        return (RowArray("level", (num_classes,), "uint8", ("class",)), RowArray("scale", (2,), "float16", ("bound",)))

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        values = logits.float()
        low = values.amin(dim=1, keepdim=True).half()
        # Float16 rounds; levels are counted with the rounded step, which is a little longer so that they reach the top.
        step = ((values.amax(dim=1, keepdim=True) - low.float()) / LEVELS * (1 + 2**-10)).half()
        levels = ((values - low.float()) / step.float().clamp(min=2**-24)).round().clamp(0, LEVELS)
        return {"level": levels.nan_to_num(0.0).to(torch.uint8), "scale": torch.cat([low, step], dim=1)}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form, which becomes float32 logits on the device."""
        return CompactLogits(rows, num_classes, _logits)


def _logits(rows: Mapping[str, Tensor]) -> Tensor:
    low, step = rows["scale"].float().unbind(dim=1)
    return low[:, None] + step[:, None] * rows["level"].float()
