"""Caches in fsspec's memory, as a storage that this process alone sees, for the tests of caches at URLs."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec

from logitcache.store.remote.client import Remote

_numbers = itertools.count()


def new_url() -> str:
    """Return a URL below which there is nothing."""
    return f"memory://store{next(_numbers)}/c.zarr"


def objects(url: str) -> dict[str, bytes]:
    """Return all objects by key."""
    remote = Remote(url)
    return {key: remote.read(key) for key in remote.list()}


def change(url: str, key: str, edit: Callable[[bytes], bytes]) -> None:
    """Put other bytes in the place of an object."""
    remote = Remote(url)
    remote.write(key, edit(remote.read(key)))


def flipped(data: bytes, offset: int = 9) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def shards_here(copies: Path) -> list[Path]:
    """List the shards of all copies in a folder."""
    return sorted(file for file in copies.glob("*/*/*.logits*/c.*") if not file.parent.name.endswith(".commits"))


def bytes_here(copies: Path) -> int:
    """Add up the shards of all copies in a folder, which threads may write meanwhile."""
    while True:
        with suppress(FileNotFoundError):  # one was renamed since it was listed
            return sum(file.stat().st_size for file in shards_here(copies))


def upload(folder: Path, url: str) -> None:
    """Copy a cache from a folder to storage."""
    fsspec.filesystem("memory").put(f"{folder}/", url, recursive=True)
