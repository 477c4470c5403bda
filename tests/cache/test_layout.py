"""Layout: what it says of shards and files is what zarr-python does."""

import math
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.features import FeatureForm
from logitcache.cache.encodings.head import HeadForm
from logitcache.cache.encodings.top_k import PackedTopK, TopK
from logitcache.cache.format.arrays import INDEX_CHECKSUM_BYTES, INDEX_ENTRY_BYTES, PAGE, ArrayGroup, ArrayLayout
from logitcache.cache.format.commits import Records, read_records
from logitcache.cache.format.layout import MOST_DECODED, SHARD_BYTES, Layout
from logitcache.cache.format.manifest import StoredFeature, StoredLogits, TeacherEntry
from logitcache.cache.format.shard_rows import choose_shard_rows, fit_to_pages
from logitcache.cache.write.writer import ShardEncoder
from logitcache.errors import RecipeError
from logitcache.models import Preprocessing
from logitcache.store.local import LocalStore
from logitcache.store.shards import Shard

ENCODINGS = [Dense(), Dense(dtype="float32"), Dense(storage="packed"), TopK(k=1), TopK(k=3, storage="packed")]


def entry(logits: Any, num_classes: int) -> TeacherEntry:
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,))
    return TeacherEntry(
        model=None,
        weights="0" * 64,
        preprocessing=preprocessing,
        precision="float32",
        num_classes=num_classes,
        logits=logits,
        stored_logits=StoredLogits(form=logits),
    )


def arrays_of(logits: Any, num_classes: int, views: int, images: int, shard_rows: int) -> list[ArrayLayout]:
    return [
        ArrayLayout(
            name=".".join(filter(None, ("t", "logits", row.suffix))),
            suffix=row.suffix,
            row_shape=row.shape,
            dtype=np.dtype(row.dtype),
            dims=row.dims,
            num_views=views,
            num_images=images,
            shard_rows=shard_rows,
            storage=logits.storage,
        )
        for row in logits.arrays(num_classes)
    ]


@given(
    st.lists(st.tuples(st.sampled_from(ENCODINGS), st.integers(3, 30000)), min_size=1, max_size=3),
    st.integers(1, 10**10),
)
def test_chosen_shards_fill_pages_and_stay_small(teachers: list[tuple[Any, int]], num_images: int) -> None:
    entries = [entry(logits, num_classes) for logits, num_classes in teachers]
    rows = choose_shard_rows(entries, num_images, None)
    largest = 0
    for one in entries:
        for array in arrays_of(one.logits, one.num_classes, 1, num_images, rows):
            largest = max(largest, array.row_bytes)
            assert array.storage == "packed" or rows * array.row_bytes % PAGE == 0
            assert rows % array.inner_rows == 0
    assert rows & (rows - 1) == 0
    # More only where whole pages take more.
    assert rows * largest <= SHARD_BYTES or rows <= PAGE
    assert rows < 2 * num_images or rows <= PAGE
    # A choice that is written down is accepted.
    assert choose_shard_rows(entries, num_images, rows) == rows


@given(st.integers(1, 8_388_607))
def test_a_stop_loses_a_sixteenth_of_a_view_at_most_or_64_rows_or_65536(num_images: int) -> None:
    rows = choose_shard_rows([entry(PackedTopK(k=10), 1000)], num_images, None)
    if num_images < 1024:
        assert rows == min(64, 1 << (num_images - 1).bit_length())
    elif num_images < 1 << 20:
        assert 16 <= num_images // rows < 32
    else:
        assert rows == 65_536


@given(st.integers(1, 1 << 18))
def test_pages_come_before_the_number_of_shards(num_images: int) -> None:
    rows = choose_shard_rows([entry(Dense(), 1000)], num_images, None)
    assert rows == 256 or 16 <= num_images // rows < 32  # whole pages come in multiples of 256 rows


@given(st.integers(8_388_608, 10**10))
def test_shards_grow_with_the_images_until_they_take_a_million_rows(num_images: int) -> None:
    rows = choose_shard_rows([entry(PackedTopK(k=10), 1000)], num_images, None)
    assert rows == 1 << 20 if num_images >= 1 << 26 else 64 <= num_images // rows < 128


@given(st.integers(1, 200_000), st.integers(1, 1 << 30))
def test_packed_shards_of_chosen_rows_are_far_below_what_may_be_decoded(num_classes: int, num_images: int) -> None:
    wanted = entry(Dense(storage="packed"), num_classes)
    rows = choose_shard_rows([wanted], num_images, None)
    assert rows * 2 * num_classes <= MOST_DECODED // 16
    assert fit_to_pages({"t": wanted}, rows) == {"t": wanted}


def test_packed_shards_that_take_too_much_memory_are_not_made() -> None:
    wanted, most = entry(Dense(storage="packed"), 1000), MOST_DECODED // 2000
    assert fit_to_pages({"t": wanted}, most) == {"t": wanted}
    with pytest.raises(
        RecipeError, match=rf"shard_rows: {most + 1} rows of t\.logits .* Fix: shard_rows: {most} at most"
    ):
        fit_to_pages({"t": wanted}, most + 1)
    assert fit_to_pages({"t": entry(Dense(), 1024)}, 1 << 22)["t"].stored_logits.form.storage == "hot"


def test_tables_that_take_too_much_memory_are_not_made() -> None:
    weights = StoredLogits(form=HeadForm(width=1024, bias=False, storage="packed"), tables={"weight": "0" * 64})
    taken_in = StoredFeature(shape=(1024,), form=FeatureForm(dtype="float16", storage="packed"))
    kept = {"stored_logits": weights, "stored_features": {"penultimate": taken_in}}
    head = entry(Dense(), MOST_DECODED // 4096).model_copy(update=kept)
    assert fit_to_pages({"t": head}, 128) == {"t": head}
    with pytest.raises(RecipeError, match=r"t\.logits: its table 'weight', float32 \[262145, 1024\], takes more"):
        fit_to_pages({"t": head.model_copy(update={"num_classes": MOST_DECODED // 4096 + 1})}, 128)


@given(st.sampled_from([Dense(), Dense(dtype="float32"), TopK(k=3)]), st.integers(3, 3000), st.integers(1, 9000))
def test_what_does_not_fill_pages_is_stored_packed(logits: Any, num_classes: int, asked: int) -> None:
    wanted = entry(logits, num_classes)
    assert choose_shard_rows([wanted], 10**6, asked) == asked
    stored = fit_to_pages({"t": wanted}, asked)["t"].stored_logits
    fills = all(asked * row.num_bytes % PAGE == 0 for row in logits.arrays(num_classes))
    assert stored == wanted.stored_logits if fills else stored.form.storage == "packed"


@given(st.integers(1, 40), st.integers(1, 500), st.integers(1, 200))
def test_shards_hold_every_row_of_every_view_once(num_views: int, num_images: int, shard_rows: int) -> None:
    layout = Layout(num_views, num_images, shard_rows, ())
    shards = list(layout.shards())
    assert len(shards) == len(set(shards)) == layout.num_shards
    assert shards == sorted(shards)
    rows = [(shard.view, row) for shard in shards for row in range(shard.start, shard.stop)]
    assert rows == [(view, row) for view in range(num_views) for row in range(num_images)]
    assert all(0 < shard.stop - shard.start <= shard_rows for shard in shards)
    assert [layout.shard(shard.view, shard.start // shard_rows) for shard in shards] == shards


@settings(max_examples=20)
@given(
    st.sampled_from(ENCODINGS),
    st.integers(3, 60),
    st.integers(1, 3),
    st.integers(1, 1500),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_files_are_those_that_zarr_writes(
    logits: Any, num_classes: int, views: int, images: int, times: int, seed: int
) -> None:
    rows = choose_shard_rows([entry(logits, num_classes)], 64, None)
    rows = max(rows, 64) * times
    generator = np.random.default_rng(seed)
    for array in arrays_of(logits, num_classes, views, images, rows):
        layout = Layout(views, images, rows, ())
        values = generator.integers(0, 99, (views, images, *array.row_shape)).astype(array.dtype)
        whole: dict[str, Any] = {}
        zarr.create_array(MemoryStore(store_dict=whole), **array.zarr_options())[...] = values
        whole = {key: data for key, data in whole.items() if not key.endswith("zarr.json")}
        encoder = ShardEncoder(array)
        for shard in layout.shards():
            written = encoder.encode(shard, np.ascontiguousarray(values[shard.view, shard.start : shard.stop]))
            assert bytes(written) == whole.pop(array.file(shard)).to_bytes()
            if array.storage == "hot":
                assert written.nbytes == array.hot_bytes(shard.stop - shard.start)
        assert not whole, "zarr has files that the layout does not know"


def test_rows_of_nothing_but_fill_values_are_written_too() -> None:
    for array in arrays_of(Dense(), 16, 1, 300, 128) + arrays_of(TopK(k=1, storage="packed"), 9, 1, 300, 128):
        zeros = np.zeros((44, *array.row_shape), array.dtype)
        fill = np.full_like(zeros, np.nan) if array.dtype.kind == "f" else zeros
        stored = ShardEncoder(array).encode(Shard(0, 256, 300), fill)
        assert stored.nbytes > array.shard_rows // array.inner_rows * INDEX_ENTRY_BYTES + INDEX_CHECKSUM_BYTES


@pytest.mark.parametrize("row_bytes", [1, 6, 40, 2000, 200_000])
@pytest.mark.parametrize("storage", ["hot", "packed"])
def test_inner_chunks_divide_shards_and_stay_near_their_size(row_bytes: int, storage: Any) -> None:
    rows = 65536
    array = ArrayLayout("t.logits", "", (row_bytes,), np.dtype("u1"), ("class",), 1, rows, rows, storage)
    assert rows % array.inner_rows == 0
    wanted = max((128 << 10) / row_bytes, 1024 if storage == "packed" else 1)
    assert min(wanted, rows) / 2 < array.inner_rows <= max(wanted, 1)


def test_only_whole_records_of_shards_that_exist_count(tmp_path: Any) -> None:
    layout = layout_with_teacher(num_views=2, num_images=300, shard_rows=128)
    folder = tmp_path / "t.logits.commits"
    (group,) = layout.groups

    def records() -> Records:
        return read_records(LocalStore(tmp_path), layout, group)

    assert records().numbers.tolist() == []
    folder.mkdir()
    real = ["c.0.0.0.0", "c.1.2.0.0"]
    strange = [
        "c.2.0.0.0",
        "c.0.3.0.0",
        "c.00.1.0.0",
        "c.-1.0.0.0",
        "c.0.1.0.0.0",
        "c.0.1.0",
        "zarr.json",
        "c.\N{ARABIC-INDIC DIGIT ZERO}.1.0.0",
    ]
    for name in [*real, *strange, "c.0.1.0.0.99-aa.logitcache-tmp", f"c.{10**30}.0.0.0"]:
        (folder / name).touch()
    assert records().numbers.tolist() == []
    assert {0, 5} <= records().damaged.keys()
    for name in [*real, *strange]:
        stored = group.arrays[0].hot_bytes(44 if name == real[1] else 128)
        (folder / name).write_bytes(stored.to_bytes(8, "little") + bytes(32))
    assert [number for number in records().numbers.tolist() if number < layout.num_shards] == [0, 5]


def layout_with_teacher(num_views: int, num_images: int, shard_rows: int) -> Layout:
    arrays = tuple(arrays_of(Dense(), 16, num_views, num_images, shard_rows))
    return Layout(num_views, num_images, shard_rows, (ArrayGroup("t.logits", arrays),))


@given(st.sampled_from(ENCODINGS), st.integers(3, 70000))
def test_the_step_of_a_layout_is_small(logits: Any, num_classes: int) -> None:
    rows = choose_shard_rows([entry(logits, num_classes)], 1, None)
    sizes = [row.num_bytes for row in logits.arrays(num_classes)]
    step = max(PAGE // math.gcd(PAGE, size) for size in sizes)
    assert rows == (step if logits.storage == "hot" else 1)
