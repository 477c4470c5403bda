"""Photographs in folders and in tar archives, as tests of remote data sets need them."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Members = Iterable[tuple[str, bytes]]


def photograph(number: int, format: str = "PNG") -> bytes:
    """Make an image file; another size and other pixels for each number."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 256, (8 + number % 5, 12 - number % 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def tarred(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    """Pack files by the standard library."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def samples(numbers: Iterable[int], labels: Mapping[int, str] | None = None) -> Members:
    """Name the members of samples: an image, its label (its number modulo 3), and something else."""
    for number in numbers:
        yield f"{number:06d}.png", photograph(number)
        yield f"{number:06d}.cls", (labels or {}).get(number, str(number % 3)).encode()
        yield f"{number:06d}.json", b"{}"


def written(folder: Path, name: str, data: bytes) -> Path:
    """Write a file, and the folders that lead to it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
