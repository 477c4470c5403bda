"""Every logit, as it is."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from logitcache.cache.encodings.base import Plain, RowArray
from logitcache.cache.format.arrays import Storage
from logitcache.logits import CompactLogits, Logits


class Dense(Plain):
    """All C logits of a row, in 2 C or 4 C bytes; float16 rounds each to 11 bits, including a common offset; float32 is
    exact.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logits", "raw logits"})
    measured: ClassVar[bool] = False

    kind: Literal["dense"] = "dense"
    dtype: Literal["float16", "float32"] = Field(default="float16", description="Type of the numbers.")
    storage: Storage = "hot"

    @property
    def exact(self) -> bool:
        """Whether float32 logits are decoded as they were."""
        return self.dtype == "float32"

    def arrays(self, num_classes: int) -> tuple[RowArray, ...]:
        """List the arrays that a row of `num_classes` logits takes."""
        return (RowArray("", (num_classes,), self.dtype, ("class",)),)

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Encode logits [B, C]."""
        return {"": logits.half() if self.dtype == "float16" else logits.float()}

    def decode(self, rows: dict[str, Tensor], num_classes: int) -> Logits:
        """Return float32 logits [B, C] as they are, float16 ones as a form that becomes float32 on the device."""
        return rows[""] if self.dtype == "float32" else CompactLogits(rows, num_classes, _float32)


def _float32(rows: Mapping[str, Tensor]) -> Tensor:
    return rows[""].float()
