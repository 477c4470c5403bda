"""Readers: our own, zarr-python, xarray and tensorstore see the same values; reading changes nothing."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.layout import Layout
from logitcache.cache.read.mapped import MappedRows
from logitcache.cache.read.row_sources import PackedRows
from logitcache.cache.read.target_codecs import TargetCodecs
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.cache.write.writer import hot_shard
from logitcache.errors import CacheError, RecipeError
from logitcache.models import Classifier, Preprocessing
from logitcache.stage_one.precompute import precompute
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views
from tests.cache.made import (
    ENCODINGS,
    TOP2,
    Linear,
    Pixels,
    made,
    raw,
    recipe,
    run,
    shard_files,
    stamps,
    stored_array,
    teacher,
)

COUNT = 2100
ROWS = {"dense16": 128, "dense32": 64, "packed": 200, "top_k": 1024, "top_k_packed": 1000}
ROWS |= {"uint8": 1024, "packed_top_k": 300, "transform": 300}


@pytest.fixture(scope="module", params=ENCODINGS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of three or more shards a view, the last one short, in every encoding and storage."""
    path = tmp_path_factory.mktemp("cache") / "c.zarr"
    return made(path, ENCODINGS[request.param], COUNT, ROWS[request.param])


def zarr_values(cache: Cache) -> dict[str, np.ndarray[Any, Any]]:
    group = zarr.open_group(cache.path, mode="r")
    return {array.name: np.asarray(group[array.name][...]) for array in cache.layout.targets[0].rows}


def test_the_values_are_those_of_the_teacher(cache: Cache) -> None:
    views = Views(cache.views(Pixels(COUNT)).dataset, cache.manifest.views)
    keys = [ViewKey(view, index) for view in range(2) for index in (0, 5, 127, 128, 1023, 1024, COUNT - 1)]
    classifier = Classifier(Linear(), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    codec = TargetCodecs(cache.snapshot.store, cache.manifest, cache.layout).logits["t.logits"]
    if codec.tables:
        pytest.skip("what is fitted is rounded by its neighbours in a batch; tests/cache/test_format.py decodes it")
    encoded = codec.encode(classifier(views.__getitems__(keys)).detach())
    found = zarr_values(cache)
    for array in cache.layout.targets[0].rows:
        wanted = encoded[array.suffix].numpy().astype(array.dtype)
        assert np.array_equal(np.stack([found[array.name][key] for key in keys]), wanted)


def stored_rows(cache: Cache, keys: list[ViewKey]) -> list[np.ndarray[Any, Any]]:
    """Return what zarr reads for keys, as the encoding decodes it."""
    arrays = cache.layout.targets[0].rows
    found = zarr_values(cache)
    rows = {a.suffix: torch.from_numpy(np.stack([found[a.name][key] for key in keys])) for a in arrays}
    codec = TargetCodecs(cache.snapshot.store, cache.manifest, cache.layout).logits["t.logits"]
    return list(raw(codec.decode(rows, 16)))


def test_rows_are_what_zarr_reads(cache: Cache) -> None:
    generator = np.random.default_rng(0)
    for size in (1, 7, 300):
        keys = [
            ViewKey(int(v), int(i))
            for v, i in zip(generator.integers(0, 2, size), generator.integers(0, COUNT, size), strict=True)
        ]
        rows = raw(cache.rows(keys)["t"].compact)
        for values, stored in zip(rows, stored_rows(cache, keys), strict=True):
            assert values.dtype == stored.dtype
            assert np.array_equal(values, stored)
    assert len(raw(cache.rows([])["t"].compact)[0]) == 0


def test_every_row_in_order_is_the_whole_array(cache: Cache) -> None:
    keys = [ViewKey(view, index) for view in range(2) for index in range(COUNT)]
    for values, stored in zip(raw(cache.rows(keys)["t"].compact), stored_rows(cache, keys), strict=True):
        assert np.array_equal(values, stored)


def test_xarray_opens_the_root_with_dimensions_and_labels(cache: Cache) -> None:
    opened = xarray.open_zarr(cache.path)
    assert opened["label"].dims == ("sample",)
    assert np.array_equal(opened["label"].values, cache.labels)
    for name, values in zarr_values(cache).items():
        assert opened[name].dims[:2] == ("view", "sample")
        assert opened[name].dtype == values.dtype
        assert np.array_equal(opened[name].values, values)
    assert opened.sizes["sample"] == COUNT
    assert opened.attrs["logitcache"]["format_version"] == 1


def test_tensorstore_reads_every_array(cache: Cache) -> None:
    for name, values in zarr_values(cache).items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache.path / name)}}
        array = tensorstore.open(spec, open=True, read=True).result()
        assert array.domain.labels[:2] == ("view", "sample")
        assert np.array_equal(array.read().result(), values)


def test_no_codec_is_outside_the_core_specification(cache: Cache) -> None:
    for file in cache.path.rglob("zarr.json"):
        assert "numcodecs." not in file.read_text()


def test_a_hot_array_is_one_mapping_over_all_shards(cache: Cache) -> None:
    for array in cache.layout.targets[0].rows:
        assert len(shard_files(cache.path, array.name)) == cache.layout.num_shards > 2
        if array.storage == "hot":
            rows = MappedRows(cache.snapshot.array(array), cache.shards).rows
            assert rows.base is not None
            assert not rows.flags.writeable
            assert len(rows) == 2 * cache.layout.shards_per_view * array.shard_rows
            with pytest.raises(ValueError, match="read-only"):
                rows[0] = 0


def test_large_shards_begin_at_huge_pages_and_give_the_same_rows(tmp_path: Path) -> None:
    array = ArrayLayout("a", "", (100,), np.dtype("<f4"), ("x",), 2, 13_000, 6_144, "hot")
    values = np.random.default_rng(0).random((2, 13_000, 100), np.float32)
    shards = list(Layout(2, 13_000, 6_144, ()).shards())
    (tmp_path / "a").mkdir()
    for shard in shards:
        (tmp_path / array.file(shard)).write_bytes(hot_shard(array, values[shard.view, shard.start : shard.stop]))
    rows = MappedRows(stored_array(tmp_path, array), shards)
    places = [(view, index) for view in range(2) for index in (0, 1, 6_143, 6_144, 12_287, 12_288, 12_999)]
    for view in range(2):
        rows.prepare(view)
    taken = rows.take(np.array([view * 3 * 6_144 + index for view, index in places]))
    assert np.array_equal(taken, np.stack([values[place] for place in places]))
    starts = [rows.rows[number * (len(rows.rows) // 6) :].ctypes.data for number in range(6)]
    assert all(start % (2 << 20) == 0 for start in starts)
    assert len(rows.rows) > 6 * 6_144


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, COUNT - 1)), min_size=1, max_size=60))
def test_a_packed_source_with_little_memory_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]]
) -> None:
    cache = packed_cache(tmp_path_factory)
    stored = zarr_values(cache)["t.logits"]
    source = PackedRows(cache.snapshot.array(cache.layout.targets[0].rows[0]), num_kept=1)
    views, indices = np.array(keys).T
    for _ in range(2):
        assert np.array_equal(source.take(views * 2100 + indices), np.array([stored[key] for key in keys]))
    assert len(source._decoded) == 1


_PACKED: dict[str, Cache] = {}


def packed_cache(factory: pytest.TempPathFactory) -> Cache:
    if not _PACKED:
        _PACKED["one"] = made(factory.mktemp("packed") / "c.zarr", ENCODINGS["packed"], COUNT, 100)
    return _PACKED["one"]


@pytest.mark.parametrize("key", [(-1, 0), (0, -1), (2, 0), (0, COUNT)])
def test_a_key_outside_the_cache_is_an_index_error(cache: Cache, key: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match=f"2 views of {COUNT} images"):
        cache.rows([ViewKey(0, 0), ViewKey(*key)])


def test_opening_and_reading_write_nothing(cache: Cache) -> None:
    before = stamps(cache.path), sorted(os.listdir(cache.path.parent))
    opened = open_cache(cache.path)
    opened.rows([ViewKey(1, 7)])
    opened.views(Pixels(COUNT))
    verify_cache(opened.snapshot)
    assert (stamps(cache.path), sorted(os.listdir(cache.path.parent))) == before


def test_a_cache_that_may_not_be_written_opens(cache: Cache, tmp_path: Path) -> None:
    copy = tmp_path / "c.zarr"
    shutil.copytree(cache.path, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR if path.is_dir() else stat.S_IRUSR)
    try:
        keys = [ViewKey(0, 3), ViewKey(1, COUNT - 1)]
        pairs = zip(raw(open_cache(copy).rows(keys)["t"].compact), raw(cache.rows(keys)["t"].compact), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(stat.S_IRWXU)


def test_a_cache_may_be_moved_and_be_reached_by_a_link(cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "there.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "there.zarr")
    keys = [ViewKey(1, 11)]
    for path in (tmp_path / "link.zarr", str(tmp_path / "there.zarr")):
        for a, b in zip(raw(open_cache(path).rows(keys)["t"].compact), raw(cache.rows(keys)["t"].compact), strict=True):
            assert np.array_equal(a, b)


def test_a_shard_that_is_a_link_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    copy = tmp_path / "c.zarr"
    shutil.copytree(cache.path, copy)
    shard = shard_files(copy, cache.layout.targets[0].rows[0].name)[1]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"no regular file"):
        open_cache(copy)
    if cache.layout.targets[0].rows[0].storage == "hot":
        with pytest.raises(CacheError):
            MappedRows(open_snapshot(copy).array(cache.layout.targets[0].rows[0]), cache.shards).prepare(0)


def test_two_teachers_keep_apart(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    teachers = {"one": teacher(), "two-2": teacher(TOP2, precision="bfloat16")}
    modules = {"one": Linear(16), "two-2": Linear(5, seed=1)}
    precompute(recipe(path, teachers=teachers, shard_rows=1024), teachers=modules, dataset=Pixels(300))
    cache = open_cache(path)
    rows = cache.rows([ViewKey(0, 4), ViewKey(1, 299)])
    assert list(rows) == ["one", "two-2"]
    assert tuple(rows["one"].logits.shape) == (2, 16)
    assert tuple(rows["two-2"].log_probs(1.0).shape) == (2, 5)
    assert xarray.open_zarr(path)["two-2.logits"].shape == (2, 300, 10)


def test_a_cache_shows_what_it_holds_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    cache = made(path)
    assert repr(cache) == f"<Cache '{path}': 300 images × 2 views of [3, 4, 4]; t: logits>"
    (path / "t.logits.commits" / "c.0.0.0.0").unlink()
    assert repr(Cache(open_snapshot(path))).endswith("; t: logits; 5 of 6 shards are committed>")


def test_an_unfinished_cache_gives_the_rows_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    whole = made(path)
    keys = [ViewKey(1, 5), ViewKey(0, 299)]
    expected = raw(whole.rows(keys)["t"].compact)[0]
    (path / "t.logits.commits" / "c.0.0.0.0").unlink()
    (path / "t.logits" / "c.0.0.0").unlink()
    partial = Cache(open_snapshot(path))
    assert not partial.complete
    assert np.array_equal(raw(partial.rows(keys)["t"].compact)[0], expected)
    with pytest.raises(CacheError, match="view 0 of image 5 is not committed"):
        partial.rows([ViewKey(1, 5), ViewKey(0, 5)])


def test_a_missing_packed_shard_is_never_read_as_fill_values(tmp_path: Path) -> None:
    cache = made(tmp_path / "c.zarr", ENCODINGS["packed"])
    (cache.path / "t.logits" / "c.1.0.0").unlink()
    with pytest.raises(CacheError, match=r"c\.1\.0\.0 is missing"):
        cache.rows([ViewKey(1, 3)])


def test_a_shard_damaged_after_opening_is_an_error_when_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_SHARED_MEMORY", "0")
    cache = made(tmp_path / "c.zarr", ENCODINGS["packed"])
    file = cache.path / "t.logits" / "c.1.0.0"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CacheError, match="bytes, its record states"):
        cache.rows([ViewKey(1, 3)])


def test_data_of_the_users_own_code_must_be_given_again(tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(30))
    with pytest.raises(RecipeError, match="never names code to run"):
        open_cache(tmp_path / "c.zarr").views()


def test_a_mapping_outlives_its_cache_and_the_interpreter_ends_in_peace(tmp_path: Path) -> None:
    cache = made(tmp_path / "c.zarr")
    script = """
        import sys, threading, time
        import numpy as np
        from logitcache import ViewKey, open_cache
        cache = open_cache(sys.argv[1])
        cache.rows([ViewKey(0, 0)])
        rows = cache._stored._sources["t.logits"].rows
        del cache
        assert rows[:256].sum() == rows[:256].sum()
        def read():
            while True:
                rows[:256].sum()
        threading.Thread(target=read, daemon=True).start()
        time.sleep(0.05)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(cache.path)], check=False)
    assert done.returncode == 0


def test_a_second_process_may_read_at_the_same_time(cache: Cache) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if len(cache.rows([ViewKey(1, 1)])) == 1 and open_cache(cache.path).complete else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
