"""The largest log-probabilities in as few bits as they need."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from logitcache.cache.encodings.base import RowArray
from logitcache.cache.encodings.bits import pack_bits, unpack_bits
from logitcache.cache.encodings.top_k import NUM_MOMENTS, LargestLogits, TopK, kept_and_tail
from logitcache.cache.format.arrays import Storage
from logitcache.config.recipe import Count, Positive
from logitcache.logits import Logits, TopKLogits

LARGEST_FALL = 255
TIE = 2**-16


class PackedTopK(LargestLogits):
    """What `top_k` keeps, in about half the bytes: about 24 for 10 of 1,000 classes once compressed.

    Classes take ⌈log₂ C⌉ bits each, log-probabilities are stored by how far each falls below the last, the rest's three
    numbers in float16. A fall beyond 255 steps, which is e^-16 at a step of 1/16, is spread over the ranks that follow.
    """

    kind: Literal["packed_top_k"] = "packed_top_k"
    k: Count = Field(description="Number of classes kept, the most probable ones.", examples=[10])
    step: Positive = Field(
        default=0.0625, description="Step of the log-probabilities in nats, to whose multiples they are rounded."
    )
    storage: Storage = "packed"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        TopK(k=self.k).arrays(num_classes)
        num_bytes = -(-self.k * _width(num_classes) // 8)
        return (
            RowArray("index", (num_bytes,), "uint8", ("byte",)),
            RowArray("fall", (self.k,), "uint8", ("rank",), "component"),
            RowArray("tail", (NUM_MOMENTS,), "float16", ("moment",), "component"),
        )

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        log_p, index, tail = kept_and_tail(logits, self.k)
        ranks = torch.arange(1, self.k + 1, device=logits.device)
        # The depth of a rank is at most 255 steps below that of the rank before.
        depth = (log_p / -self.step).round() - LARGEST_FALL * ranks
        depth = torch.cummin(depth, dim=1).values + LARGEST_FALL * ranks
        falls = torch.diff(depth, dim=1, prepend=torch.zeros_like(depth[:, :1]))
        return {
            "index": pack_bits(index, _width(logits.shape[1])),
            "fall": falls.nan_to_num(0.0, 0.0, 0.0).to(torch.uint8),
            "tail": tail.half(),
        }

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return the encoded form; it becomes a distribution at a temperature, on the device."""
        ranks = torch.arange(self.k, device=rows["fall"].device)
        # What fell by nothing stays below: the first rank is the most probable class.
        log_p = rows["fall"].float().cumsum(dim=1) * -self.step - ranks * TIE
        return TopKLogits(log_p, unpack_bits(rows["index"], _width(num_classes), self.k), rows["tail"], num_classes)


def _width(num_classes: int) -> int:
    """Return the bits that tell `num_classes` classes apart."""
    return max(1, (num_classes - 1).bit_length())
