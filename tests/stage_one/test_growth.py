"""A cache that grows: the difference is computed, nothing is rewritten, readers see the old state or the new."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.format.root import GROWING
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.gc import collect
from logitcache.errors import CacheError, MismatchError, ReplayMismatchError
from logitcache.report.inspect import inspect_cache
from logitcache.report.verify_and_repair import verify
from logitcache.runtime import console
from logitcache.stage_one.precompute import PrecomputeResult, precompute
from logitcache.store.local import LocalStore
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    AGAIN,
    DENSE16,
    FLIP_AND_CROP,
    TOP2_PACKED,
    TRIED,
    Linear,
    Pixels,
    contents,
    raw,
    recipe,
    run,
    stamps,
    teacher,
    verified,
)
from tests.stage_one.runs import NUM_IMAGES, Stopping
from tests.teacher.nets import FEATURES, Net, images, keeping

ENTRIES = {"t": teacher(), "u": teacher(TOP2_PACKED), "v": teacher(DENSE16, precision="float32")}
MODULES: dict[str, nn.Module] = {"t": Linear(), "u": Linear(7, seed=1), "v": Linear(5, seed=2)}
CANARIES = "canary/c/0/0/0/0"


def grow(
    path: Path,
    num_views: int,
    names: str,
    modules: dict[str, nn.Module] | None = None,
    num_images: int = NUM_IMAGES,
    **changes: Any,
) -> Any:
    """Precompute some of the three teachers on some views."""
    changes = {"shard_rows": 2048, "batch_size": 100} | changes
    plan = recipe(
        path,
        views={"num_views": num_views, "seed": 3, "augmentations": FLIP_AND_CROP},
        teachers={name: ENTRIES[name] for name in names},
        **changes,
    )
    chosen = {name: (modules or MODULES)[name] for name in names}
    return precompute(plan, teachers=chosen, dataset=Pixels(num_images))


def same_but_canaries(one: Path, other: Path) -> bool:
    """Whether all files are equal but for the canaries, which stay those of the views that a cache began with."""
    found = []
    for path in (one, other):
        files = contents(path)
        root = json.loads(files.pop("zarr.json"))
        del files[CANARIES], root["attributes"]["logitcache"]["sha256"]
        del root["attributes"]["logitcache"]["manifest"]["canaries"]
        found.append((files, root))
    return found[0] == found[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "c.zarr"
    grow(path, 2, "t", row_checksums=True, record_parameters=True)
    return path


RECORDED = {"row_checksums": True, "record_parameters": True}


@pytest.fixture
def cache(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "c.zarr"))


@pytest.mark.parametrize(
    ("steps", "written"),
    [
        ([(4, "t")], [2]),
        ([(2, "tu")], [2]),
        ([(3, "tu")], [3]),
        ([(2, "ut"), (3, "utv"), (4, "utv")], [2, 3, 1]),
    ],
)
def test_growing_computes_the_difference_and_rewrites_nothing(
    steps: list[tuple[int, str]], written: list[int], cache: Path, tmp_path: Path
) -> None:
    kept = {name: stamp for name, stamp in stamps(cache).items() if "/c." in name or "label/" in name}
    for (num_views, names), count in zip(steps, written, strict=True):
        result: PrecomputeResult = grow(cache, num_views, names, **RECORDED)
        assert (result.shards_written, result.shards_left, result.shards) == (count, 0, num_views)
        assert verified(cache) == ()
    assert {name: stamp for name, stamp in stamps(cache).items() if name in kept} == kept
    num_views, names = steps[-1]
    grow(tmp_path / "w.zarr", num_views, names, **RECORDED)
    assert same_but_canaries(cache, tmp_path / "w.zarr")


def test_only_teachers_that_are_added_answer(cache: Path) -> None:
    class Refusing(Linear):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            assert self.calls <= 1 + AGAIN, "only the canaries"
            return super().forward(images)

    result = grow(cache, 2, "tu", MODULES | {"t": Refusing()}, **RECORDED)
    assert (result.row_views, result.teacher_passes) == (600, 600 + 2 * TRIED)


def test_a_teacher_that_is_added_gives_the_same_bytes_as_at_once(cache: Path, tmp_path: Path) -> None:
    """With as many views the canaries are the same ones too."""
    grow(cache, 2, "tu", **RECORDED)
    grow(tmp_path / "w.zarr", 2, "tu", **RECORDED)
    assert contents(cache) == contents(tmp_path / "w.zarr")


def test_a_growth_that_was_stopped_leaves_the_old_cache_and_continues(cache: Path, tmp_path: Path) -> None:
    old = open_cache(cache)
    digest, rows = old.manifest.digest(), raw(old.answers([ViewKey(1, 7)])["t"].compact)
    with pytest.raises(KeyboardInterrupt):
        grow(cache, 4, "tu", MODULES | {"u": Stopping(8, num_classes=7, seed=1)}, **RECORDED)
    assert (cache / GROWING).exists()
    half = open_cache(cache)
    assert half.manifest.digest() == digest
    assert verified(cache) == ()
    assert np.array_equal(raw(half.answers([ViewKey(1, 7)])["t"].compact), rows)
    growing = inspect_cache(cache)["growing"]
    assert (growing["views"], growing["targets"]) == (4, ["t.logits", "u.logits"])
    result = grow(cache, 4, "tu", **RECORDED)
    assert 0 < result.shards_written == growing["shards"] - growing["shards_committed"] < 4
    assert inspect_cache(cache)["growing"] is None
    assert not (cache / GROWING).exists()
    grow(tmp_path / "w.zarr", 4, "tu", **RECORDED)
    assert same_but_canaries(cache, tmp_path / "w.zarr")
    assert open_cache(cache).num_views == 4


def test_an_unfinished_cache_grows_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(tmp_path / "c.zarr", 2, "t", {"t": Stopping(5)})
    assert grow(tmp_path / "c.zarr", 3, "tu").shards == 3
    grow(tmp_path / "w.zarr", 3, "tu")
    assert same_but_canaries(tmp_path / "c.zarr", tmp_path / "w.zarr")


def test_an_unfinished_cache_that_grows_may_be_finished_as_it_began(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    with pytest.raises(KeyboardInterrupt):
        grow(path, 2, "t", {"t": Stopping(5)})
    with pytest.raises(KeyboardInterrupt):
        grow(path, 3, "tu", MODULES | {"u": Stopping(1, num_classes=7, seed=1)})
    assert grow(path, 2, "t").shards_left == 0
    assert open_cache(path).num_views == 2
    grow(path, 3, "tu")
    assert open_cache(path).num_views == 3


@pytest.mark.parametrize(("num_views", "names"), [(1, "t"), (2, "u"), (1, "tu")])
def test_a_recipe_that_asks_for_less_has_nothing_to_do(
    num_views: int, names: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grow(cache, 2, "tu", **RECORDED)
    before = stamps(cache)
    console.configure()
    try:
        result = grow(cache, num_views, names, **RECORDED)
    finally:
        console.configure(quiet=True)
    assert (result.shards, result.shards_written, result.shards_left) == (num_views, 0, 0)
    assert "there is nothing to do" in capsys.readouterr().err
    assert stamps(cache) == before


def test_a_recipe_that_asks_for_less_mends_what_it_can(cache: Path) -> None:
    grow(cache, 2, "tu", **RECORDED)
    sound = contents(cache)
    (cache / "t.logits/c.0.0.0").write_bytes(b"")
    assert grow(cache, 1, "t", **RECORDED).shards_written == 1
    assert contents(cache) == sound


REFUSED: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "a teacher left out": (3, "u", {}, "teachers.t: only in the cache"),
    "one for another": (2, "u", {}, "teachers.t: only in the cache\n  teachers.u: only in the recipe"),
    "without checksums": (3, "t", {"row_checksums": False}, "row_checksums: the cache has True, the recipe False"),
    "other shards": (3, "t", {"shard_rows": 4096}, "shard_rows: the cache has 2048, the recipe 4096"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_growth_that_would_change_what_is_there_is_refused(name: str, cache: Path) -> None:
    num_views, names, changes, message = REFUSED[name]
    before = stamps(cache)
    with pytest.raises(MismatchError, match=f"(?s){message}.*Fix:") as caught:
        grow(cache, num_views, names, **(RECORDED | changes))
    assert caught.value.exit_code == 4
    assert stamps(cache) == before


def test_another_teacher_may_not_continue_a_growth(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(cache, 3, "tu", MODULES | {"u": Stopping(3, num_classes=7, seed=1)}, **RECORDED)
    for names, modules, message in (
        ("tu", MODULES | {"u": Linear(7, seed=9)}, "teachers.u.weights"),
        ("tv", MODULES, "teachers.u: only in the cache"),
    ):
        with pytest.raises(MismatchError, match=rf"(?s)growing to 3 views by t, u; `logitcache gc.*{message}"):
            grow(cache, 3, names, modules, **RECORDED)
    assert grow(cache, 2, "t", **RECORDED).shards_written == 0
    assert grow(cache, 4, "tuv", **RECORDED).shards_left == 0
    assert verified(cache) == ()


def test_other_pixels_are_noticed_before_anything_is_added(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitcache.views.spec import Views

    render = Views.__getitems__
    monkeypatch.setattr(Views, "__getitems__", lambda self, keys: render(self, keys) ^ 1)
    before = stamps(cache)
    with pytest.raises(ReplayMismatchError, match="augmented images differ"):
        grow(cache, 2, "tu", **RECORDED)
    assert stamps(cache) == before


def test_other_pixels_that_no_canary_shows_are_noticed_by_row_checksums(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitcache.views.spec import Views

    render = Views.__getitems__
    shown = {(canary.view, canary.index) for canary in open_snapshot(cache).manifest.canaries}

    def drifting(self: Views, keys: list[ViewKey]) -> torch.Tensor:
        unseen = torch.tensor([tuple(key) not in shown for key in keys], dtype=torch.uint8)
        return render(self, keys) ^ unseen[:, None, None, None]

    monkeypatch.setattr(Views, "__getitems__", drifting)
    with pytest.raises(ReplayMismatchError, match="is not the one that the teacher saw"):
        grow(cache, 2, "tu", **RECORDED)
    assert open_snapshot(cache).committed()["t.logits"]
    assert not list((cache / "u.logits.commits").glob("c.*"))


def test_a_teacher_whose_rows_do_not_fill_pages_is_stored_packed(tmp_path: Path) -> None:
    grow(tmp_path / "c.zarr", 1, "t", shard_rows=128)
    grow(tmp_path / "c.zarr", 1, "tv", shard_rows=128)
    assert grow(tmp_path / "c.zarr", 1, "tv", shard_rows=128).shards_written == 0
    opened = open_cache(tmp_path / "c.zarr")
    assert verified(tmp_path / "c.zarr") == ()
    entry = opened.manifest.teachers["v"]
    assert entry.logits == Dense(dtype="float16")  # as it was asked for
    assert entry.stored_logits is not None
    assert entry.stored_logits.form.storage == "packed"
    grow(tmp_path / "apart.zarr", 1, "v")
    views = [ViewKey(0, index) for index in range(NUM_IMAGES)]
    apart = open_cache(tmp_path / "apart.zarr")
    assert torch.equal(opened.rows(views)["v"].logits, apart.rows(views)["v"].logits)


@pytest.mark.parametrize(("shard_rows", "num_images"), [(1, 40), (7, 100), (100, NUM_IMAGES)])
def test_any_number_of_rows_is_a_shard(shard_rows: int, num_images: int, tmp_path: Path) -> None:
    grow(tmp_path / "c.zarr", 1, "tuv", num_images=num_images, shard_rows=shard_rows)
    assert verified(tmp_path / "c.zarr") == ()
    opened = open_cache(tmp_path / "c.zarr")
    assert opened.manifest.shard_rows == shard_rows
    grow(tmp_path / "d.zarr", 1, "tuv", num_images=num_images)
    views = [ViewKey(0, index) for index in range(num_images)]
    ours, theirs = opened.rows(views), open_cache(tmp_path / "d.zarr").rows(views)
    assert all(torch.equal(ours[name].logits, theirs[name].logits) for name in "tuv")


def test_of_what_is_added_only_what_does_not_fill_pages_is_packed(tmp_path: Path) -> None:
    features = {"tokens": FEATURES["tokens"], "pooled": {**FEATURES["pooled"], "storage": "hot"}}
    run(tmp_path / "c.zarr", images(), Net(), teachers={"t": keeping()}, shard_rows=128)
    run(tmp_path / "c.zarr", images(), Net(), teachers={"t": keeping(None, features)}, shard_rows=128)
    stored = open_cache(tmp_path / "c.zarr").manifest.teachers["t"].stored_features
    assert features["tokens"].get("storage", "hot") == "hot"
    assert {name: kept.form.storage for name, kept in stored.items()} == {"tokens": "hot", "pooled": "packed"}


def test_plain_readers_see_the_grown_arrays(cache: Path) -> None:
    grow(cache, 3, "tu", **RECORDED)
    group = zarr.open_group(cache, mode="r")
    for name in ("t.logits", "u.logits", "views.crc32", "t.logits.commits"):
        assert group[name].shape[0] == zarr.open_array(cache / name, mode="r").shape[0] == 3
    assert np.isfinite(group["t.logits"][:]).all()  # type: ignore[index]


def test_a_reader_at_any_moment_of_the_last_step_sees_the_old_state_or_the_new(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that the last step replaces, and each file that a reader reads, is a moment."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        found = open_cache(cache)
        seen.append((found.num_views, len(found.manifest.teachers)))
        found.rows([ViewKey(found.num_views - 1, 0)])
        assert verified(cache) == ()

    write = LocalStore.write

    def watched(self: LocalStore, key: str, data: bytes | memoryview) -> None:
        if "/c." in key:  # a shard, or its record
            write(self, key, data)
            return
        look()
        write(self, key, data)
        look()

    monkeypatch.setattr(LocalStore, "write", watched)
    grow(cache, 3, "tu", **RECORDED)
    assert seen[0] == (2, 1)
    assert seen[-1] == (3, 2)
    assert set(seen) == {(2, 1), (3, 2)}
    assert len(seen) == 2 * 11  # before and after each file


@pytest.mark.parametrize("moment", range(0, 14, 2))
def test_a_reader_during_whose_opening_a_cache_grows_is_content(
    moment: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    real = LocalStore.read

    def counted(self: LocalStore, *arguments: Any) -> bytes:
        nonlocal reads
        reads += 1
        if reads == moment + 1:
            monkeypatch.setattr(LocalStore, "read", real)
            grow(cache, 3, "tu", **RECORDED)
        return real(self, *arguments)

    monkeypatch.setattr(LocalStore, "read", counted)
    assert open_cache(cache).num_views == (2 if moment else 3)
    assert open_cache(cache).num_views == 3


def test_a_damaged_note_of_growth_is_an_error_for_writers_only(cache: Path) -> None:
    (cache / GROWING).write_text('{"num_views": 0}')
    assert open_cache(cache).num_views == 2
    with pytest.raises(CacheError, match="does not describe what the cache was growing to"):
        grow(cache, 3, "t", **RECORDED)


STALE = {
    "of this growth": ([(3, "tu")], 0),
    "of an earlier growth": ([(3, "tu"), (4, "tuv")], 0),
    "of other teachers": ([(2, "tu"), (2, "tuv"), (4, "tuv")], 1),
}


@pytest.mark.parametrize("case", STALE)
def test_a_note_that_comes_back_after_its_growth_confuses_nobody(
    case: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may apply a write late that was tried twice, after the note was removed."""
    notes: list[bytes] = []

    def noted(self: LocalStore, key: str, data: bytes | memoryview) -> None:
        if key == GROWING:
            notes.append(bytes(data))
        write(self, key, data)

    write, (steps, number) = LocalStore.write, STALE[case]
    monkeypatch.setattr(LocalStore, "write", noted)
    for views, names in steps:
        grow(cache, views, names, **RECORDED)
    before = contents(cache)
    (cache / GROWING).write_bytes(notes[number])
    assert inspect_cache(cache)["growing"] is None
    assert open_cache(cache).num_views == steps[-1][0]
    assert verify(cache).problems == ()
    [found] = collect(cache, dry_run=True)
    assert (found.path, found.why) == (f"{cache}/{GROWING}", "the note of a growth that is finished")
    assert collect(cache) == [found]
    assert contents(cache) == before
    (cache / GROWING).write_bytes(notes[number])
    grow(cache, *steps[-1], **RECORDED)
    assert contents(cache) == before
