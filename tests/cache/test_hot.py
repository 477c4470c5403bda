"""Shard files of our own making are those of zarr-python, byte for byte."""

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.write.writer import hot_shard
from logitcache.store.shards import Shard


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(["<f2", "<f4", "<u2", "|u1", "|i1", "<i8"]),
    row_shape=st.lists(st.integers(1, 40), max_size=3).map(tuple),
    pages=st.integers(1, 3),
    data=st.data(),
)
def test_a_hot_shard_is_what_zarr_writes(
    dtype: str, row_shape: tuple[int, ...], pages: int, data: st.DataObject
) -> None:
    row_bytes = int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    shard_rows = pages * 4096 // int(np.gcd(4096, row_bytes))
    stop = shard_rows + data.draw(st.integers(1, shard_rows))
    dims = tuple("abc"[: len(row_shape)])
    array = ArrayLayout("t.x", "x", row_shape, np.dtype(dtype), dims, 2, stop, shard_rows, "hot")
    shard = data.draw(st.sampled_from([Shard(1, 0, shard_rows), Shard(0, shard_rows, stop)]))
    generator = np.random.default_rng(stop)
    rows = generator.integers(0, 100, (shard.stop - shard.start, *row_shape)).astype(dtype)
    assert bytes(hot_shard(array, rows)) == encoded_by_zarr(array, shard, rows)


def encoded_by_zarr(array: ArrayLayout, shard: Shard, rows: np.ndarray[Any, Any]) -> bytes:
    files: dict[str, Buffer] = {}
    stored = zarr.create_array(MemoryStore(store_dict=files), **array.zarr_options())
    stored[shard.view, shard.start : shard.stop] = rows
    return files[array.file(shard)].to_bytes()


@pytest.mark.parametrize("value", [float("nan"), -0.0, float("inf")])
def test_every_bit_of_a_float_is_kept(value: float) -> None:
    array = ArrayLayout("t.x", "", (2,), np.dtype("<f2"), ("a",), 1, 1024, 1024, "hot")
    rows = np.full((1024, 2), value, "<f2")
    rows.view("<u2")[3, 1] = 0x7E01  # a NaN of another payload
    assert bytes(hot_shard(array, rows))[: rows.nbytes] == rows.tobytes()
