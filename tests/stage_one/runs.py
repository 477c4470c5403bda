"""Runs that end early, and the folders they read, for the tests of precompute."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.cache.made import AGAIN, Linear, Pixels, contents, run, write_images

NUM_IMAGES = 300


class Stopping(nn.Module):
    """A linear teacher that raises after some batches, those of the canaries once, as a fault in a run would."""

    def __init__(self, batches: int, **options: Any) -> None:
        super().__init__()
        self.inner = Linear(**options)
        self.left = batches + AGAIN
        self.weight = self.inner.weight

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        answers: Tensor = self.inner(images)
        return answers

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.inner.state_dict(*args, **options)


def partial(path: Path, images: object | None = None, batches: int = 5, **changes: Any) -> None:
    """Leave a run in its middle: canaries take one batch, each shard of 128 rows three."""
    with pytest.raises(KeyboardInterrupt):
        run(path, images or Pixels(NUM_IMAGES), Stopping(batches), **({"shard_rows": 128} | changes))


def whole(path: Path, images: object | None = None, **changes: Any) -> dict[str, bytes]:
    run(path, images or Pixels(NUM_IMAGES), **({"shard_rows": 128} | changes))
    return contents(path)


def folder(root: Path) -> Path:
    return write_images(root, {"ant": 20, "bee": 20})


def entry(root: Path, **options: Any) -> dict[str, Any]:
    return {"kind": "image_folder", "root": str(root), **options}


def truncated(root: Path, name: str = "bee/012.png") -> bytes:
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: len(data) // 2])
    return data
