"""Folders of a bounded size: how many bytes they may hold, and which of their files go first."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from logitcache.errors import RecipeError
from logitcache.store.file_locks import PART

_SIZE = re.compile(r"(\d{1,15})([KMG]?)", re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Held(NamedTuple):
    """A file that takes its part of the room: when it was last used, in seconds, its bytes, and where it is."""

    used: float
    size: int
    path: str


def make_room(held: Iterable[Held], left: int, wanted: int) -> int:
    """Remove the least recently used files until `wanted` bytes are left, if they can be; returns how many are.

    What is being written stays.
    """
    for file in sorted(held):
        if left >= wanted:
            break
        if not file.path.endswith(PART):
            with suppress(FileNotFoundError):
                os.unlink(file.path)
            left += file.size
    return left


def quarter_of(folder: Path) -> int:
    """Return a quarter of the bytes of the file system that a folder is on."""
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize // 4


def told_size(variable: str) -> int | None:
    """Return the bytes that an environment variable says; None where it says nothing.

    Raises RecipeError where it is no size.
    """
    told = os.environ.get(variable, "").strip()
    if not told:
        return None
    match = _SIZE.fullmatch(told.upper())
    if match is None:
        raise RecipeError(
            f"{variable} is {told!r}, which is no size. Fix: a number of bytes, or one with K, M or G, as 8G"
        )
    return int(match[1]) * _UNITS[match[2]]
