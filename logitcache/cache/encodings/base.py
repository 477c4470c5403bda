"""What every encoding shares."""

import math
from typing import Literal, NamedTuple

import numpy as np

Storage = Literal["hot", "packed"]
"""hot: uncompressed, read in place by random access. packed: compressed, read by whole shards."""

Order = Literal["sample", "component"]
"""How an inner chunk lies before it is compressed: row after row, or one number of all rows after another."""


class RowArray(NamedTuple):
    """One array of an encoding: what it holds of each view of each image."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    order: Order = "sample"

    @property
    def num_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize
