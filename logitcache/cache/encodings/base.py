"""What every encoding shares."""

import math
from typing import Literal, NamedTuple

import numpy as np

Storage = Literal["hot", "packed"]
"""hot: uncompressed, read in place by random access. packed: compressed, read by whole shards."""


class RowArray(NamedTuple):
    """One array of an encoding: what it holds of each view of each image."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize
