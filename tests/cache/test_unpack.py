"""Packed shards are decoded as zarr decodes them, or not at all."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import zstd

from logitcache.cache.format.arrays import ArrayLayout, Order
from logitcache.cache.read.stored_array import _content_bytes
from logitcache.errors import CacheError
from logitcache.store.shards import Shard
from tests.cache.made import stored_array
from tests.memory import taking_at_most

COUNT, ROWS = 2500, 2048


def written(
    root: Path, dtype: str, shape: tuple[int, ...], order: Order = "sample"
) -> tuple[ArrayLayout, np.ndarray[Any, Any]]:
    dims = tuple("abc"[: len(shape)])
    layout = ArrayLayout("x", "", shape, np.dtype(dtype), dims, 2, COUNT, ROWS, "packed", order)
    values = np.random.default_rng(0).integers(0, 9, (2, COUNT, *shape)).astype(dtype)
    zarr.create_array(zarr.storage.LocalStore(root), **layout.zarr_options())[...] = values
    return layout, values


@pytest.mark.parametrize("order", ["sample", "component"])
@pytest.mark.parametrize(("dtype", "shape"), [("<f2", (7,)), ("<f4", ()), ("|i1", (3, 2)), ("<i8", (5,))])
def test_every_shard_is_what_was_written(dtype: str, shape: tuple[int, ...], order: Order, tmp_path: Path) -> None:
    layout, values = written(tmp_path, dtype, shape, order)
    unpack = stored_array(tmp_path, layout).rows
    for view in range(2):
        for shard in (Shard(view, 0, ROWS), Shard(view, ROWS, COUNT)):
            assert np.array_equal(unpack(shard), values[view, shard.start : shard.stop])


@pytest.mark.parametrize(
    "change",
    [
        {"filters": [{"name": "transpose", "configuration": {"order": [0, 2, 1]}}]},
        {"compressors": None},
        {"compressors": [{"name": "gzip", "configuration": {"level": 1}}]},
        {"filters": [{"name": "numcodecs.delta", "configuration": {"dtype": "<f2"}}]},
        {"compressors": [{"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}]},
    ],
)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_another_chain_of_codecs_is_not_decoded(change: dict[str, Any], tmp_path: Path) -> None:
    layout, values = written(tmp_path, "<f2", (7,))
    zarr.create_array(zarr.storage.LocalStore(tmp_path), **layout.zarr_options() | change, overwrite=True)[...] = values
    with pytest.raises(CacheError, match="other codecs than those of this format"):
        stored_array(tmp_path, layout).rows(Shard(1, ROWS, COUNT))


SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"bomb"


def undeclared(size: int) -> bytes:
    """Return a frame of `size` zeros that declares no size: blocks of one repeated byte, of at most 128 KiB."""
    sizes = [min(size - start, 1 << 17) for start in range(0, size, 1 << 17)]
    last = len(sizes) - 1
    blocks = (struct.pack("<I", each << 3 | 2 | (number == last))[:3] + b"\0" for number, each in enumerate(sizes))
    return struct.pack("<I", 0xFD2FB528) + b"\0\xa8" + b"".join(blocks)


def frames(size: int) -> dict[str, bytes]:
    """Return chunks that hold more than `size` zeros, in every way that zstd has, or none of them."""
    whole, bomb = bytes(zstd.compress(bytes(size), 1)), bytes(zstd.compress(bytes(400 << 20), 1))
    return {
        "a bomb": bomb,
        "a bomb that declares nothing": undeclared(400 << 20),
        "a bomb after a frame": whole + bomb,
        "a bomb that declares nothing after a frame": whole + undeclared(400 << 20),
        "a frame that declares nothing": undeclared(size),
        "a bomb after a skipped frame": SKIPPED + bomb,
        "a frame after a skipped one": SKIPPED + whole,
        "a skipped frame that looks like one": struct.pack("<IBI", 0x184D2A50, 0x60, size - 256) + bytes(60) + whole,
        "two halves": bytes(zstd.compress(bytes(size // 2), 1)) * 2,
        "nothing": b"",
        "a magic number": whole[:4],
        "a frame cut short": whole[:-1],
        "a window of 2 GB": struct.pack("<I", 0xFD2FB528) + b"\xc0\xa8" + struct.pack("<Q", size) + whole[6:],
    }


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("order", ["sample", "component"])
@pytest.mark.parametrize("per_shard", [False, True])
def test_no_frame_takes_more_memory_than_the_rows_of_its_shard(
    order: Order, per_shard: bool, checksum: bool, tmp_path: Path
) -> None:
    layout, _ = written(tmp_path, "<u2", (3,), order)
    layout = replace(layout, per_shard=per_shard)
    shard, size = Shard(0, 0, ROWS), layout.inner_rows * layout.row_bytes
    file = tmp_path / layout.file(shard)
    checksummed = bytes(zstd.compress(bytes(500 << 20), 1, checksum))
    with taking_at_most(50 << 20):
        for name, chunk in {**frames(size), "a checksum": checksummed}.items():
            index = np.array([[0, len(chunk)]] * (ROWS // layout.inner_rows), "<u8").tobytes()
            file.write_bytes(chunk + index + bytes(4))
            with pytest.raises(CacheError, match="cannot be decoded"):
                pytest.fail(f"{name}: {stored_array(tmp_path, layout).rows(shard)}")


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
        found = stored_array(tmp_path, layout).rows(shard)
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
            stored_array(tmp_path, layout).rows(Shard(0, 0, ROWS))


@given(st.integers(0, 70_000), st.integers(-5, 19))
def test_the_content_size_of_a_frame_is_read(size: int, level: int) -> None:
    data = np.random.default_rng(size).integers(0, 4, size, np.uint8).tobytes()
    assert _content_bytes(memoryview(bytes(zstd.compress(data, level)))) == size


@given(st.binary(max_size=30))
def test_any_bytes_may_be_asked_for_their_content_size(data: bytes) -> None:
    size = _content_bytes(memoryview(data))
    assert size is None or size >= 0
