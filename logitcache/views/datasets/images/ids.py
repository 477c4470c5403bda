"""Names of images, held in little memory: as many bytes as they have, and where each ends."""

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 12  # names that are unpacked at a time


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
    """Any names, in one array of bytes; a string is made where one is asked for.

    Arrays, as these are what processes that render can share.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode(errors="surrogateescape")
            ends.append(len(text))
        self._text = np.frombuffer(text, np.uint8).copy()  # without what the buffer could still grow by
        self._ends = narrowed(np.frombuffer(ends, np.int64))

    @classmethod
    def joined(cls, parts: Sequence["PackedIds"]) -> "PackedIds":
        """Return the names of all parts, one part after another."""
        starts = np.cumsum([0, *(len(part._text) for part in parts)])
        whole, total = cls(), int(starts[-1])
        whole._text = np.concatenate([whole._text, *(part._text for part in parts)])
        whole._ends = np.empty(sum(map(len, parts)), np.min_scalar_type(total))
        place = 0
        for start, part in zip(starts.tolist(), parts, strict=False):
            np.add(part._ends, start, out=whole._ends[place : place + len(part)], dtype=np.int64, casting="unsafe")
            place += len(part)
        return whole

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or a list of several."""
        if isinstance(index, slice):
            return self._several(range(*index.indices(len(self))))
        place = _position(index, len(self))
        start = int(self._ends[place - 1]) if place else 0
        return _decoded(self._text[start : int(self._ends[place])].tobytes())

    def _several(self, places: range) -> list[str]:
        if places.step != 1 or not places:
            return [self[place] for place in places]
        stops = self._ends[places.start : places.stop].tolist()
        first = int(self._ends[places.start - 1]) if places.start else 0
        text = self._text[first : stops[-1]].tobytes()
        return [
            _decoded(text[start - first : stop - first]) for start, stop in zip([first, *stops], stops, strict=False)
        ]


class PathsBelow(Sequence[str]):
    """The paths of files, by their names below a folder."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one path, or a list of several."""
        if isinstance(index, slice):
            return [f"{self._folder}/{name}" for name in self._names[index]]
        return f"{self._folder}/{self._names[index]}"


def narrowed(numbers: NDArray[np.integer[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """Return a copy of whole numbers, none of them below 0, in the narrowest type that holds all."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _decoded(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _position(index: int, length: int) -> int:
    place = operator.index(index)
    if not -length <= place < length:
        raise IndexError(f"image {index} of {length}")
    return place % length
