"""A sound cache, and copies of it to damage."""

import shutil
from pathlib import Path

import pytest

from tests.cache.made import COUNT, Pixels, run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "c.zarr"
    run(path, Pixels(COUNT), shard_rows=128)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage: six shards of dense float16 logits."""
    return Path(shutil.copytree(sound, tmp_path / "c.zarr"))
