"""`cache.as_dask()`: every target as a lazy array, a chunk for each shard."""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from numpy.typing import NDArray

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.read import shard_reader
from logitcache.errors import CacheError
from logitcache.logits import log_probs
from logitcache.stage_one.precompute import precompute
from logitcache.targets import feature_values
from logitcache.views.keys import ViewKey
from tests.cache.made import ENCODINGS, Linear, Pixels, flip, made, recipe, run, shard_files, teacher
from tests.teacher.nets import FEATURES, Net, images, keeping


@pytest.fixture(autouse=True)
def _in_this_thread() -> Any:
    with dask.config.set(scheduler="synchronous"):
        yield


def keys(cache: Cache, view: int) -> list[ViewKey]:
    return [ViewKey(view, index) for index in range(len(cache))]


def normalized(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log softmax, of numbers that are given up to a constant for each row."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", ENCODINGS)
def test_logits_are_those_of_batches_by_key(name: str, tmp_path: Path) -> None:
    cache = made(tmp_path / "c.zarr", ENCODINGS[name], 1100, 1024)
    logits = cache.as_dask()["t"]["logits"]
    assert (logits.shape, logits.dtype) == ((2, 1100, 16), np.float32)
    assert logits.chunks == ((1, 1), (1024, 76), (16,))
    for view in range(2):
        expected = log_probs(cache.answers(keys(cache, view))["t"]).numpy()
        np.testing.assert_allclose(normalized(logits[view].compute()), expected, atol=1e-5)


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("featured") / "c.zarr"
    entries = {"t": keeping({"kind": "head", "dtype": "float32", "storage": "packed"}, FEATURES)}
    run(path, images(), Net(), teachers=entries, shard_rows=None)
    return open_cache(path)


def test_features_and_logits_of_a_head_are_those_of_batches_by_key(featured: Cache) -> None:
    found = featured.as_dask()["t"]
    assert found.keys() == {"logits", "penultimate", *FEATURES}
    expected = featured.answers(keys(featured, 1))["t"]
    for name, feature in expected.features.items():
        np.testing.assert_array_equal(found[name][1].compute(), feature_values(feature).numpy())
    np.testing.assert_allclose(normalized(found["logits"][1].compute()), log_probs(expected).numpy(), atol=1e-5)


def test_teachers_are_combined_chunk_by_chunk(tmp_path: Path) -> None:
    entries = {"first": teacher(), "second": teacher({"kind": "top_k", "k": 3, "storage": "packed"})}
    modules = {"first": Linear(), "second": Linear(seed=1)}
    plan = recipe(tmp_path / "c.zarr", teachers=entries, shard_rows=128)
    precompute(plan, teachers=modules, dataset=Pixels(300))
    cache = open_cache(tmp_path / "c.zarr")
    found: Mapping[str, Any] = {name: targets["logits"] for name, targets in cache.as_dask().items()}
    p = [da_softmax(logits) for logits in found.values()]
    mean = (p[0] + p[1]) / 2
    assert mean.chunks[:2] == ((1, 1), (128, 128, 44))
    answers = cache.answers(keys(cache, 0)).values()
    expected = sum(log_probs(targets).double().exp().numpy() for targets in answers) / 2
    np.testing.assert_allclose(mean[0].compute(), expected, atol=1e-5)


def da_softmax(logits: Any) -> Any:
    values = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def test_only_the_shards_that_are_computed_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    compare = shard_reader.require_intact

    def noted(root: Path, layout: Any, shards: Any) -> None:
        read.extend(shards)
        compare(root, layout, shards)

    opened = open_cache(cache)
    monkeypatch.setattr(shard_reader, "require_intact", noted)
    logits = opened.as_dask()["t"]["logits"]
    assert read == []
    assert logits[1, 130:140].compute().shape == (10, 16)
    assert read == [(1, 128, 256)]


def test_a_shard_that_is_damaged_meanwhile_is_refused(cache: Path) -> None:
    logits = open_cache(cache).as_dask()["t"]["logits"]
    flip(shard_files(cache)[0], 5)
    with pytest.raises(CacheError, match=r"t\.logits view 0 rows 0\.\.128: its bytes differ from its record"):
        logits[0, :3].compute()
    assert np.isfinite(logits[1].compute()).all()


def test_an_array_may_be_computed_in_another_process(cache: Path, tmp_path: Path) -> None:
    logits = open_cache(cache).as_dask()["t"]["logits"]
    there = pickle.loads(pickle.dumps(logits))
    assert there.name == logits.name
    np.testing.assert_array_equal(there.compute(), logits.compute())
    moved = Path(shutil.copytree(cache, tmp_path / "moved.zarr"))
    np.testing.assert_array_equal(open_cache(moved).as_dask()["t"]["logits"].compute(), logits.compute())
