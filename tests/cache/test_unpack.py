"""Packed shards are decoded as zarr decodes them, or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import zstd

from logitcache.cache.arrays import ArrayLayout, Shard
from logitcache.cache.unpack import Unpacker, _content_bytes
from logitcache.errors import CacheError
from tests.cache.made import stored_array

COUNT, ROWS = 2500, 2048


def written(root: Path, dtype: str, shape: tuple[int, ...]) -> tuple[ArrayLayout, np.ndarray[Any, Any]]:
    layout = ArrayLayout("x", "", shape, np.dtype(dtype), tuple("abc"[: len(shape)]), 2, COUNT, ROWS, "packed")
    values = np.random.default_rng(0).integers(0, 9, (2, COUNT, *shape)).astype(dtype)
    zarr.create_array(zarr.storage.LocalStore(root), **layout.zarr_options())[...] = values
    return layout, values


@pytest.mark.parametrize(("dtype", "shape"), [("<f2", (7,)), ("<f4", ()), ("|i1", (3, 2)), ("<i8", (5,))])
def test_every_shard_is_what_was_written(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    layout, values = written(tmp_path, dtype, shape)
    unpack = Unpacker(stored_array(tmp_path, layout))
    assert unpack._decode == unpack._inflate
    for view in range(2):
        for shard in (Shard(view, 0, ROWS), Shard(view, ROWS, COUNT)):
            assert np.array_equal(unpack(shard), values[view, shard.start : shard.stop])
            data = (tmp_path / layout.file(shard)).read_bytes()
            assert np.array_equal(unpack._read(data, shard), values[view, shard.start : shard.stop])


def test_another_chain_of_codecs_is_left_to_zarr(tmp_path: Path) -> None:
    layout, values = written(tmp_path, "<f2", (7,))
    options = layout.zarr_options() | {"filters": [{"name": "transpose", "configuration": {"order": [0, 2, 1]}}]}
    zarr.create_array(zarr.storage.LocalStore(tmp_path), **options, overwrite=True)[...] = values
    unpack = Unpacker(stored_array(tmp_path, layout))
    assert unpack._decode == unpack._read
    assert np.array_equal(unpack(Shard(1, ROWS, COUNT)), values[1, ROWS:])


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_an_error_or_changes_nothing(seed: int, tmp_path: Path) -> None:
    layout, values = written(tmp_path, "|i1", (3,))
    shard, generator = Shard(1, 0, ROWS), np.random.default_rng(seed)
    file = tmp_path / layout.file(shard)
    data = bytearray(file.read_bytes())
    if seed % 4 == 0:
        del data[int(generator.integers(len(data))) :]
    else:
        data[int(generator.integers(len(data) - 60 if seed % 2 else 0, len(data)))] ^= 16
    file.write_bytes(data)
    try:
        found = Unpacker(stored_array(tmp_path, layout))(shard)
    except CacheError as error:
        assert "cannot be decoded" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(found, values[1, :ROWS])


def test_a_chunk_of_another_size_is_an_error(tmp_path: Path) -> None:
    layout, _ = written(tmp_path, "|i1", (3,))
    file = tmp_path / layout.file(Shard(0, 0, ROWS))
    data = file.read_bytes()
    for size in (3 * layout.inner_rows - 1, 10**9):
        chunk = bytes(zstd.compress(bytes(size), 1))
        index = np.array([[0, len(chunk)]] * (ROWS // layout.inner_rows), "<u8").tobytes()
        file.write_bytes(chunk + index + data[-4:])
        with pytest.raises(CacheError, match="does not hold"):
            Unpacker(stored_array(tmp_path, layout))(Shard(0, 0, ROWS))


@given(st.integers(0, 70_000), st.integers(-5, 19))
def test_the_content_size_of_a_frame_is_read(size: int, level: int) -> None:
    data = np.random.default_rng(size).integers(0, 4, size, np.uint8).tobytes()
    assert _content_bytes(memoryview(bytes(zstd.compress(data, level)))) == size


@given(st.binary(max_size=30))
def test_any_bytes_may_be_asked_for_their_content_size(data: bytes) -> None:
    size = _content_bytes(memoryview(data))
    assert size is None or size >= 0
