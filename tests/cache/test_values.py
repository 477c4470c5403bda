"""Numbers that no teacher means are refused: NaN and infinity, classes that do not exist, labels of none."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.cache.format.arrays import ArrayLayout
from logitcache.cache.format.samples import labels_of
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.verify import verify_cache
from logitcache.cache.write.writer import CacheWriter, ShardEncoder, commit_record
from logitcache.cli import main
from logitcache.errors import CacheError, RecipeError
from logitcache.logits import TopKLogits
from logitcache.store.local import LocalStore
from logitcache.views.datasets.base import Fingerprint
from logitcache.views.keys import ViewKey
from tests.cache.elsewhere import new_url, upload
from tests.cache.made import (
    DENSE16,
    DENSE32,
    PACKED,
    PACKED_TOP2,
    TOP2,
    TOP2_PACKED,
    TRANSFORM,
    UINT8,
    Linear,
    Pixels,
    forge,
    run,
    teacher,
)

POOLED = {"kind": "pooled", "tap": "0"}
FLOATS = {
    "hot float16": (DENSE16, None, "t.logits", ()),
    "hot float32": (DENSE32, None, "t.logits", ()),
    "packed float16": (PACKED, None, "t.logits", ()),
    "moments of top-k": (TOP2, None, "t.logits", (slice(0, 2), "<f4")),
    "probabilities of top-k": (TOP2, None, "t.logits", (slice(9, 10), "<f2")),
    "packed top-k": (TOP2_PACKED, None, "t.logits", (slice(8, 9), "<f2")),
    "moments of packed top-k": (PACKED_TOP2, None, "t.logits.tail", ()),
    "scales of uint8": (UINT8, None, "t.logits.scale", ()),
    "a feature": (DENSE16, POOLED, "t.f", ()),
    "scales of a feature": (DENSE16, {**POOLED, "dtype": "int8", "storage": "packed"}, "t.f.scale", ()),
    "errors": (UINT8, None, "t.logits.errors", ()),
}


def make(path: Path, logits: Any, feature: Any = None) -> None:
    features = {} if feature is None else {"features": {"f": feature}}
    teachers = {"t": teacher(logits, **features)}
    module = nn.Sequential(Linear(10))
    run(path, Pixels(300, num_classes=10), module, teachers=teachers, shard_rows=2048, batch_size=300)


def spoil(path: Path, name: str, change: Callable[[np.ndarray[Any, Any]], object]) -> str:
    """Change the rows of one shard and seal them, as an attacker would; returns the key of the shard."""
    snapshot = open_snapshot(path)
    array = next(array for array in snapshot.layout.arrays if array.name == name)
    shard = snapshot.layout.shard(1, 0)
    rows = np.array(snapshot.array(array).rows(shard))
    change(rows)
    stored = ShardEncoder(array).encode(shard, rows)
    (path / array.file(shard)).write_bytes(stored)
    records = bytearray((path / array.record_file(shard)).read_bytes())
    records[40 * array.position : 40 * array.position + 40] = commit_record(stored, array.file(shard))
    (path / array.record_file(shard)).write_bytes(records)
    return array.file(shard)


def read_all(path: Path | str) -> None:
    cache = open_cache(path)
    cache.rows([ViewKey(view, index) for view in range(2) for index in range(len(cache))])


@pytest.mark.parametrize("name", FLOATS)
def test_no_float_of_a_shard_is_nan_or_infinite(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, feature, array, words = FLOATS[name]
    make(tmp_path / "sound.zarr", logits, feature)
    for value in (np.nan, np.inf, -np.inf):
        path = Path(shutil.copytree(tmp_path / "sound.zarr", tmp_path / f"{value}.zarr"))

        def change(rows: np.ndarray[Any, Any], value: float = value) -> None:
            floats = rows[:, words[0]].view(words[1]) if words else rows
            floats.reshape(len(rows), -1)[len(rows) // 2, -1] = value

        key = spoil(path, array, change)
        assert main(["verify", str(path)]) == 3
        [problem] = verify_cache(open_snapshot(path)).problems
        assert "NaN or infinity" in problem
        assert key in problem
        if array != "t.logits.errors":  # which no row is decoded with
            with pytest.raises(CacheError, match=rf"{key}.*NaN or infinity|NaN or infinity.*{key}"):
                read_all(path)
    capsys.readouterr()


@pytest.mark.parametrize("logits", [DENSE16, PACKED, TOP2_PACKED], ids=["hot", "packed", "top-k"])
def test_storage_gives_no_row_of_nan(logits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_COPY", str(tmp_path / "copies"))
    make(tmp_path / "c.zarr", logits)
    words = slice(8, 9) if "k" in logits else slice(None)
    spoil(tmp_path / "c.zarr", "t.logits", lambda rows: rows[5:6, words].view("<f2").fill(np.nan))
    url = new_url()
    upload(tmp_path / "c.zarr", url)
    with pytest.raises(CacheError, match="NaN or infinity"):
        read_all(url)
    assert main(["verify", url]) == 3


@pytest.mark.parametrize("logits", [TOP2, TOP2_PACKED, PACKED_TOP2], ids=["hot", "packed", "bits"])
@pytest.mark.parametrize("wrong", [10, 15])
def test_no_row_names_a_class_that_does_not_exist(logits: Any, wrong: int, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    make(path, logits)

    def change(rows: np.ndarray[Any, Any]) -> None:
        if rows.dtype == np.uint16:
            rows[-1, 7] = wrong
        else:
            rows[-1, 0] = rows[-1, 0] & 0x0F | wrong << 4

    key = spoil(path, "t.logits.index" if logits is PACKED_TOP2 else "t.logits", change)
    [problem] = verify_cache(open_snapshot(path)).problems
    assert f"{key}: a row names a class that does not exist, of 10" in problem
    cache = open_cache(path)
    cache.rows([ViewKey(0, 5), ViewKey(1, 0)])
    with pytest.raises(CacheError, match=rf"{key}: a row names a class .*Fix: remove it; run the same"):
        cache.rows([ViewKey(0, 5), ViewKey(1, 299)])
    with pytest.raises(CacheError, match=key):
        cache.as_dask()["t"]["logits"].compute()
    (path / key).unlink()  # the fix
    make(path, logits)
    assert verify_cache(open_snapshot(path)).problems == ()


def test_an_encoding_declares_which_rows_are_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_row(self: UInt8, rows: Any, decoded: Any) -> tuple[int, str] | None:
        found = (rows["level"] == 0x7F).all(dim=1).nonzero().flatten().tolist()
        return (found[0], "holds NaN") if found else None

    path = tmp_path / "c.zarr"
    make(path, UINT8)
    key = spoil(path, "t.logits.level", lambda rows: rows[-1].fill(0x7F))
    assert verify_cache(open_snapshot(path)).problems == ()  # any bits of a level are a number
    monkeypatch.setattr(UInt8, "any_bits", False)
    monkeypatch.setattr(UInt8, "wrong_row", wrong_row)
    [problem] = verify_cache(open_snapshot(path)).problems
    assert f"{key}: a row holds NaN. Fix: remove it; run the same" in problem
    cache = open_cache(path)
    cache.rows([ViewKey(0, 5), ViewKey(1, 0)])
    with pytest.raises(CacheError, match=rf"{key}: a row holds NaN"):
        cache.rows([ViewKey(0, 5), ViewKey(1, 299)])


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(np.uint16, 65535), (np.int32, -1), (np.int32, 2**31 - 1), (np.int64, 70000)]
)
def test_a_wrong_class_is_found_in_every_type(dtype: Any, wrong: int) -> None:
    index = np.zeros((3, 2), dtype)
    form = TopKLogits(
        torch.zeros(3, 2), torch.from_numpy(index), torch.zeros(3, 3), 65535 if dtype is np.uint16 else 70000
    )
    assert form.wrong_row() is None
    index[1, 1] = wrong
    assert form.wrong_row() == 1
    assert form[:0].wrong_row() is None


def recorded(**changes: Any) -> Fingerprint:
    some = "0" * 64
    plain = {"num_images": 3, "num_classes": 7, "class_names": None}
    return Fingerprint.model_validate(plain | dict.fromkeys(("ids", "labels", "sizes", "content"), some) | changes)


@pytest.mark.parametrize("wrong", [2**62, -(2**63), -2, 10])
def test_labels_are_classes_or_none(wrong: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.zarr"
    make(path, DENSE16)
    labels = np.fromfile(path / "label/c/0", "<i8")
    labels[200] = wrong
    (path / "label/c/0").write_bytes(labels.tobytes())
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    forge(path, lambda manifest: manifest["fingerprint"].update(labels=digest))
    for command in ("verify", "inspect"):
        assert main([command, str(path)]) == 3
        assert f"the label of image 200 is {wrong}, not one of 10 classes" in "".join(capsys.readouterr())
    with pytest.raises(CacheError, match="the label of image 200"):
        open_cache(path)


def test_labels_of_any_number_of_classes_are_1_0_or_minus_1() -> None:
    fingerprint = recorded(multi_label=True, num_classes=2)
    assert labels_of(bytes([0, 1, 255, 0, 1, 1]), fingerprint).tolist() == [[0, 1], [-1, 0], [1, 1]]
    for wrong in (2, 127, 254):
        with pytest.raises(ValueError, match="the label of image 1"):
            labels_of(bytes([0, 1, 0, wrong, 1, 1]), fingerprint)
    with pytest.raises(ValueError, match="one of 0 classes"):
        labels_of(np.array([-1, 0, -1], "<i8").tobytes(), recorded(num_classes=None))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_table_holds_nan(value: float, tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    make(path, TRANSFORM)
    name = next(table for table in open_snapshot(path).layout.tables if table.suffix == "deviation")
    table = np.fromfile(path / name.file, "<f4")
    table[0] = value
    (path / name.file).write_bytes(table.tobytes())
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    forge(path, lambda m: m["teachers"]["t"]["stored_logits"]["tables"].update(deviation=digest))
    assert main(["verify", str(path)]) == 3
    with pytest.raises(CacheError, match=f"{name.file}: it holds NaN or infinity"):
        open_cache(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    make(path, DENSE16)
    layout = open_snapshot(path).layout
    writer = CacheWriter(LocalStore(path), layout)
    writer.submit(layout.shard(0, 0), {"t.logits": np.full((300, 10), np.inf, "<f2")})
    with pytest.raises(RecipeError, match=r"t\.logits view 0 rows 0\.\.300 would hold NaN .*Fix: dtype: float32"):
        writer.flush()
    writer.close()
    assert verify_cache(open_snapshot(path)).problems == ()


def test_every_finite_number_is_finite() -> None:
    """Of all 2^16 float16 numbers those pass that NumPy calls finite."""
    layout = ArrayLayout("x", "", (1,), np.dtype("<f2"), ("a",), 1, 1, 1, "hot")
    every = np.arange(1 << 16, dtype=np.uint16).view("<f2").reshape(-1, 1)
    assert [layout.is_finite(row[None]) for row in every] == np.isfinite(every[:, 0]).tolist()
    for dtype in ("<f4", "<f8"):
        extremes = np.array([np.finfo(dtype).max, np.finfo(dtype).min, 0.0, -0.0, np.finfo(dtype).tiny], dtype)
        wide = ArrayLayout("x", "", (), np.dtype(dtype), (), 1, 5, 5, "hot")
        assert wide.is_finite(extremes)
        assert not any(wide.is_finite(np.append(extremes, value).astype(dtype)) for value in (np.nan, np.inf, -np.inf))
