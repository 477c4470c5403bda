"""Names of images, held in little memory: as many bytes as they have, and where each ends."""

import operator
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 12  # names that are unpacked at a time


class _Names(Sequence[str], ABC):
    """Names that are made when they are read."""

    @abstractmethod
    def _several(self, places: range) -> list[str]:
        """Return the names at some places."""

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self._several(range(start, min(start + _BLOCK, len(self))))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one name, or a list of several."""
        if isinstance(index, slice):
            return self._several(range(*index.indices(len(self))))
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"image {place} of {len(self)}")
        place %= len(self)
        return self._several(range(place, place + 1))[0]


class NumberedIds(_Names):
    """The names "prefix00000", "prefix00001", …; never fewer digits than the last one needs."""

    def __init__(self, prefix: str, num_images: int) -> None:
        self._prefix, self._num_images = prefix, num_images
        self._digits = max(5, len(str(num_images - 1)))

    def __len__(self) -> int:
        return self._num_images

    def _several(self, places: range) -> list[str]:
        return [f"{self._prefix}{place:0{self._digits}d}" for place in places]


class PackedIds(_Names):
    """Any names, in one array of bytes.

    Arrays, as these are what processes that render can share.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode(errors="surrogateescape")
            ends.append(len(text))
        self.text: NDArray[np.uint8] = np.frombuffer(
            text, np.uint8
        ).copy()  # without what the buffer could still grow by
        self.ends: NDArray[np.integer[Any]] = narrowed(np.frombuffer(ends, np.int64))

    @classmethod
    def of_arrays(cls, text: NDArray[np.uint8], ends: NDArray[np.integer[Any]]) -> Self:
        """Take the bytes of all names, and where each ends."""
        packed = cls()
        packed.text, packed.ends = text, ends
        return packed

    @classmethod
    def joined(cls, parts: Sequence["PackedIds"]) -> Self:
        """Return the names of all parts, one part after another."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        ends, place = np.empty(sum(map(len, parts)), np.min_scalar_type(int(starts[-1]))), 0
        for start, part in zip(starts.tolist(), parts, strict=False):
            np.add(part.ends, start, out=ends[place : place + len(part)], dtype=np.int64, casting="unsafe")
            place += len(part)
        return cls.of_arrays(np.concatenate([np.empty(0, np.uint8), *(part.text for part in parts)]), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def _several(self, places: range) -> list[str]:
        if places.step != 1 or not places:
            return [self[place] for place in places]
        stops = self.ends[places.start : places.stop].tolist()
        first = int(self.ends[places.start - 1]) if places.start else 0
        text = self.text[first : stops[-1]].tobytes()
        pairs = zip([first, *stops], stops, strict=False)
        return [text[start - first : stop - first].decode(errors="surrogateescape") for start, stop in pairs]


class PathsBelow(_Names):
    """The paths of files, by their names below a folder."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def _several(self, places: range) -> list[str]:
        names = self._names[places.start : places.stop] if places.step == 1 else [self._names[at] for at in places]
        return [f"{self._folder}/{name}" for name in names]


def narrowed(numbers: NDArray[np.integer[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """Return a copy of whole numbers, none of them below 0, in the narrowest type that holds all."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
