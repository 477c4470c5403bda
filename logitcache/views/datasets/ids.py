"""Names of images, held in little memory: worker processes copy them."""

import operator
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class NumberedIds(Sequence[str]):
    """The names "prefix00000", "prefix00001", …; never fewer digits than the last one needs."""

    def __init__(self, prefix: str, num_images: int) -> None:
        self._prefix = prefix
        self._num_images = num_images
        self._digits = max(5, len(str(num_images - 1)))

    def __len__(self) -> int:
        return self._num_images

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return f"{self._prefix}{_position(index, len(self)):0{self._digits}d}"


class PackedIds(Sequence[str]):
    """Any names, in one block of bytes: a million take megabytes and pickle at once."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = _position(index, len(self))
        start = int(self._ends[place - 1]) if place else 0
        return self._bytes[start : int(self._ends[place])].decode(errors="surrogateescape")


def _position(index: int, length: int) -> int:
    place = operator.index(index)
    if not -length <= place < length:
        raise IndexError(f"image {index} of {length}")
    return place % length
