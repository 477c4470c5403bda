"""A cache of images of any number of classes each: what is stored, read with zarr alone, and what damage is found."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from logitcache.cache.cache import open_cache
from logitcache.errors import CacheError, MismatchError
from tests.cache.made import Linear, Pixels, contents, flip, forge, run, verified

COUNT, CLASSES = 300, 16
FILE = "label/c/0/0"


class Marked(Pixels):
    """Random images with multi-hot labels, some of which are unknown."""

    def __init__(self) -> None:
        super().__init__(COUNT)
        self.table = np.random.default_rng(1).integers(-1, 2, (COUNT, CLASSES), dtype=np.int8)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.table[index]


def make(path: Path, images: Marked) -> int:
    return run(path, images, Linear(CLASSES), shard_rows=128).shards_written


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("marked") / "c.zarr"
    make(path, Marked())
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "c.zarr"))


def test_zarr_alone_reads_the_table_that_the_manifest_digests(sound: Path) -> None:
    group = zarr.open_group(sound, mode="r")
    stored, entry = group["label"], group.attrs["logitcache"]
    assert isinstance(stored, zarr.Array)
    assert isinstance(entry, dict)
    assert stored.dtype == np.int8
    assert stored.metadata.dimension_names == ("sample", "class")  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(stored[...]), Marked().table)
    assert (sound / FILE).read_bytes() == Marked().table.tobytes()
    recorded: Any = entry["manifest"]["fingerprint"]  # type: ignore[index, call-overload]
    assert recorded["multi_label"] is True
    assert recorded["num_classes"] == CLASSES
    assert recorded["labels"] == hashlib.sha256(Marked().table.tobytes()).hexdigest()


def test_the_same_command_finds_nothing_to_do(cache: Path, sound: Path) -> None:
    assert make(cache, Marked()) == 0
    assert contents(cache) == contents(sound)
    assert verified(cache) == ()
    assert np.array_equal(open_cache(cache).labels, Marked().table)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_labels_are_refused_and_mended(damage: str, cache: Path, sound: Path) -> None:
    if damage == "flip":
        flip(cache / FILE, 17)
    elif damage == "truncate":
        (cache / FILE).write_bytes((cache / FILE).read_bytes()[:-1])
    else:
        (cache / FILE).unlink()
    with pytest.raises(CacheError, match="label"):
        open_cache(cache)
    assert any(FILE in problem for problem in verified(cache))
    assert make(cache, Marked()) == 0
    assert contents(cache) == contents(sound)


def test_other_labels_are_not_continued(cache: Path) -> None:
    images = Marked()
    images.table[3, 4] = 1 - images.table[3, 4].clip(min=0)
    with pytest.raises(MismatchError, match="labels: recorded"):
        make(cache, images)


@pytest.mark.parametrize("change", [{"multi_label": False}, {"num_classes": 10**12}, {"num_classes": None}])
def test_a_manifest_that_claims_other_labels_is_refused_at_once(change: dict[str, Any], cache: Path) -> None:
    forge(cache, lambda manifest: manifest["fingerprint"].update(change))
    with pytest.raises(CacheError):
        open_cache(cache)


def test_a_manifest_from_before_has_one_class_an_image(tmp_path: Path) -> None:
    run(tmp_path / "c", Pixels(COUNT, CLASSES), shard_rows=128)
    forge(tmp_path / "c", lambda manifest: manifest["fingerprint"].pop("multi_label"))
    manifest = json.loads((tmp_path / "c" / "zarr.json").read_text())["attributes"]["logitcache"]["manifest"]
    assert "multi_label" not in manifest["fingerprint"]
    assert open_cache(tmp_path / "c").labels.dtype == np.int64
