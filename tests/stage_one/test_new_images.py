"""Images are appended to a cache: only they are answered, in its order, and nothing of the old ones moves."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.root import GROWING
from logitcache.cache.snapshot import open_snapshot
from logitcache.cache.write.gc import collect
from logitcache.errors import CacheError, LogitCacheError, MismatchError, RecipeError
from logitcache.planning.plan import plan
from logitcache.report.inspect import inspect_cache
from logitcache.stage_one.precompute import PrecomputeResult, precompute
from logitcache.store.local import LocalStore
from logitcache.views.datasets.image_folder import ImageFolder
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    DENSE16,
    FLIP_AND_CROP,
    TOP2_PACKED,
    TRANSFORM,
    Linear,
    Pixels,
    contents,
    flip,
    forge,
    raw,
    recipe,
    stamps,
    teacher,
    verified,
)
from tests.memory import taking_at_most

FIRST = [f"{name}/{number:03d}.png" for name in ("cat", "dog") for number in range(45)]
NEW = [*(f"cat/a{number:02d}.png" for number in range(5)), *(f"dog/a{number:02d}.png" for number in range(25))]
"""Sorted after the first ones of their class: a folder of all has neither at its end."""

ENTRIES = {"t": teacher(DENSE16), "u": teacher(TOP2_PACKED), "v": teacher(TRANSFORM)}
MODULES: dict[str, nn.Module] = {"t": Linear(2), "u": Linear(2, seed=1), "v": Linear(2, seed=2)}
VIEWS = {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP}
MIXED = VIEWS | {"mixing": [{"kind": "mixup", "alpha": 0.8}], "pairing_window": 8}


def add(folder: Path, names: Sequence[str]) -> Path:
    """Write images, each a function of its name."""
    for name in names:
        generator = np.random.default_rng(list(name.encode()))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / name)
    return folder


def grow(
    cache: Path | str,
    folder: Path,
    names: str = "tuv",
    modules: dict[str, nn.Module] | None = None,
    part: str | None = None,
    **changes: Any,
) -> PrecomputeResult:
    """Precompute a folder, given as an object: a cache does not record where it lies."""
    changes = {"new_images": "append", "views": VIEWS, "shard_rows": 40, "batch_size": 20} | changes
    changes |= {"row_checksums": True, "record_parameters": True}
    wanted = recipe(
        cache,  # type: ignore[arg-type]
        teachers={name: ENTRIES[name] for name in names},
        **changes,
    )
    given = {name: (modules or MODULES)[name] for name in names}
    return precompute(wanted, teachers=given, dataset=ImageFolder(root=str(folder)).open(), part=part)


def rows_of(cache: Cache, num_images: int) -> list[Any]:
    keys = [ViewKey(view, index) for view in range(cache.num_views) for index in range(num_images)]
    answers = cache.answers(keys)
    return [values for name in sorted(answers) for values in raw(answers[name].compact)]


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the first images, and a cache of them: a view is two shards of 40 rows and one of 10."""
    root = tmp_path_factory.mktemp("base")
    grow(root / "c.zarr", add(root / "images", FIRST))
    return root


@pytest.fixture
def world(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "world"))


@pytest.fixture(scope="module")
def grown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after all new images were appended at once."""
    root = Path(shutil.copytree(base, tmp_path_factory.mktemp("grown") / "world"))
    grow(root / "c.zarr", add(root / "images", NEW))
    return root


def test_only_new_images_are_answered_and_old_rows_stay(base: Path, world: Path) -> None:
    class Counting(Linear):
        rows = 0

        def forward(self, images: Tensor) -> Tensor:
            self.rows += len(images)
            return super().forward(images)

    before, kept = open_cache(base / "c.zarr"), stamps(world / "c.zarr")
    kept = {name: stamp for name, stamp in kept.items() if "/c." in name and name.split("/c.")[1][2] != "2"}
    counting = Counting(2)
    result = grow(world / "c.zarr", add(world / "images", NEW), modules=MODULES | {"t": counting})
    assert (result.shards_written, result.row_views, result.shards_left) == (2, 2 * len(NEW), 0)
    assert counting.rows < 2 * len(NEW) + 2 * 20 + 3 * 64  # with copies that fill batches, and canaries
    after = open_cache(world / "c.zarr")
    assert len(after) == 120
    assert after.manifest.teachers["v"].stored_logits == before.manifest.teachers["v"].stored_logits
    assert equal(rows_of(after, 90), rows_of(before, 90))
    assert {name: stamp for name, stamp in stamps(world / "c.zarr").items() if name in kept} == kept
    assert verified(world / "c.zarr") == ()


def test_the_cache_keeps_its_order_and_answers_are_those_of_the_images(grown: Path) -> None:
    cache = open_cache(grown / "c.zarr")
    views = cache.views(open_folder(grown))
    assert list(views.dataset.ids) == [*FIRST, *NEW]
    assert views.dataset.labels.tolist() == [int(name.startswith("dog")) for name in [*FIRST, *NEW]]
    keys = [ViewKey(1, index) for index in (0, 89, 90, 95, 119)]
    pixels = (views.__getitems__(keys).float() / 255 - 0.5) / 0.5
    assert torch.equal(cache.rows(keys)["t"].logits, Linear(2)(pixels).half())


@pytest.mark.parametrize("steps", [[5, 30], [1, 2, 12, 30]])
def test_any_number_of_steps_writes_identical_bytes(steps: list[int], world: Path, grown: Path) -> None:
    done = 0
    for stop in steps:
        grow(world / "c.zarr", add(world / "images", NEW[done:stop]))
        assert verified(world / "c.zarr") == ()
        done = stop
    assert contents(world / "c.zarr") == contents(grown / "c.zarr")
    assert sorted(os.listdir(world / "c.zarr")) == sorted(os.listdir(grown / "c.zarr"))


def test_canaries_and_calibration_are_those_of_the_first_images_and_new_ones_get_their_own(
    base: Path, grown: Path
) -> None:
    old, new = (open_snapshot(root / "c.zarr").manifest for root in (base, grown))
    assert new.canaries[: len(old.canaries)] == old.canaries
    added = [canary.index for canary in new.canaries[len(old.canaries) :]]
    assert added[:8] == list(range(90, 98))
    assert max(added) < 120
    tables = [name for name in contents(base / "c.zarr") if name.startswith("v.logits.") and "/c/" in name]
    assert tables
    assert all((base / "c.zarr" / name).read_bytes() == (grown / "c.zarr" / name).read_bytes() for name in tables)


def test_a_reader_that_is_open_keeps_the_cache_that_it_opened(world: Path, base: Path) -> None:
    read, unread = open_cache(world / "c.zarr"), open_cache(world / "c.zarr")
    expected = rows_of(read, 90)
    grow(world / "c.zarr", add(world / "images", NEW[:3]))
    grow(world / "c.zarr", add(world / "images", NEW[3:]))
    assert equal(rows_of(read, 90), expected)
    assert equal(rows_of(unread, 90), expected)  # which had mapped nothing
    assert len(unread) == len(unread.labels) == 90
    unread.require_intact()


def test_a_reader_at_any_moment_of_the_last_step_sees_the_old_images_or_the_new(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, old, expected = [], open_cache(world / "c.zarr"), rows_of(open_cache(world / "c.zarr"), 90)

    def look() -> None:
        found = open_cache(world / "c.zarr")
        seen.append(len(found))
        assert len(found.labels) == len(found)
        assert equal(rows_of(found, 90), expected)

    write = LocalStore.write

    def watched(self: LocalStore, key: str, data: bytes | memoryview) -> None:
        write(self, key, data)
        if ".staged" not in key:
            look()

    monkeypatch.setattr(LocalStore, "write", watched)
    grow(world / "c.zarr", add(world / "images", NEW))
    assert set(seen) == {90, 120}
    assert seen == sorted(seen)
    old.require_intact()


def test_a_growth_that_was_stopped_is_finished_with_the_images_that_it_began_with(
    world: Path, grown: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopping(Linear):
        left = 5

        def forward(self, images: Tensor) -> Tensor:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().forward(images)

    add(world / "images", NEW[:12])
    with pytest.raises(KeyboardInterrupt):
        grow(world / "c.zarr", world / "images", modules=MODULES | {"t": Stopping(2)})
    assert (world / "c.zarr" / GROWING).exists()
    assert len(open_cache(world / "c.zarr")) == 90
    assert verified(world / "c.zarr") == ()
    growing = inspect_cache(world / "c.zarr")["growing"]
    assert growing["images"] == 102
    add(world / "images", NEW[12:])  # they wait
    grow(world / "c.zarr", world / "images")
    assert len(open_cache(world / "c.zarr")) == 102
    grow(world / "c.zarr", world / "images")
    assert contents(world / "c.zarr") == contents(grown / "c.zarr")


def test_a_growth_may_be_given_up(world: Path, base: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(world / "c.zarr", add(world / "images", NEW), modules=MODULES | {"v": Interrupting(2, seed=2)})
    collect(world / "c.zarr", growth=True)
    assert contents(world / "c.zarr") == contents(base / "c.zarr")


class Interrupting(Linear):
    """A teacher that is interrupted after the canaries and a batch."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 6:
            raise KeyboardInterrupt
        return super().forward(images)


def test_where_it_is_not_asked_for_other_images_are_refused(world: Path) -> None:
    add(world / "images", NEW)
    before = stamps(world / "c.zarr")
    with pytest.raises(
        MismatchError, match=r"(?s)was made from other images.*30 images are new or changed.*Fix: point"
    ):
        grow(world / "c.zarr", world / "images", new_images="refuse")
    assert stamps(world / "c.zarr") == before


def test_a_grown_cache_refuses_new_images_unless_they_are_appended(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "w"))
    assert grow(root / "c.zarr", root / "images", new_images="refuse").shards_written == 0
    add(root / "images", ["cat/z.png"])
    with pytest.raises(
        MismatchError, match=r"(?s)1 images of the data set are new: 'cat/z.png'.*Fix: new_images: append"
    ):
        grow(root / "c.zarr", root / "images", new_images="refuse")


def test_classes_are_never_renumbered(world: Path) -> None:
    add(world / "images", ["ant/000.png", "cat/a00.png"])
    with pytest.raises(MismatchError, match=r"(?s)1 new images are of classes .*'ant/000.png'.*Fix: move these"):
        grow(world / "c.zarr", world / "images")
    shutil.rmtree(world / "images/ant")
    grow(world / "c.zarr", world / "images")
    assert len(open_cache(world / "c.zarr")) == 91


def test_missing_images_are_named(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "w"))
    (root / "images/cat/007.png").unlink()
    (root / "images/dog/a03.png").unlink()
    for act in (
        lambda: grow(root / "c.zarr", root / "images"),
        lambda: open_cache(root / "c.zarr").views(open_folder(root)),
    ):
        with pytest.raises(
            MismatchError, match=r"(?s)2 of its 120 images are missing.*'cat/007.png', 'dog/a03.png'.*Fix:"
        ):
            act()


def open_folder(root: Path) -> ImageFolder:
    return ImageFolder(root=str(root / "images"))


def append_to(root: Path) -> object:
    return grow(root / "c.zarr", root / "images")


def open_views(root: Path) -> object:
    return open_cache(root / "c.zarr").views(open_folder(root))


def test_a_changed_image_is_refused(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "w"))
    shutil.copy(root / "images/cat/000.png", root / "images/dog/a03.png")
    for act in (
        lambda: grow(root / "c.zarr", root / "images"),
        lambda: open_cache(root / "c.zarr").views(open_folder(root)),
    ):
        with pytest.raises(MismatchError, match=r"(?s)was made from other images.*'dog/a03.png'"):
            act()


def test_copies_of_an_image_are_told_apart_by_their_names(base: Path, world: Path) -> None:
    for name in ("cat/0000.png", "cat/zz.png"):
        shutil.copy(world / "images/cat/003.png", world / "images" / name)
    grow(world / "c.zarr", world / "images")
    assert list(open_cache(world / "c.zarr").views(open_folder(world)).dataset.ids) == [
        *FIRST,
        "cat/0000.png",
        "cat/zz.png",
    ]


def test_images_and_views_are_added_one_after_the_other(world: Path) -> None:
    add(world / "images", NEW[:2])
    with pytest.raises(RecipeError, match=r"adds images to .* Fix: run precompute first with the views"):
        grow(world / "c.zarr", world / "images", views=VIEWS | {"num_views": 3})
    grow(world / "c.zarr", world / "images")
    grow(world / "c.zarr", world / "images", views=VIEWS | {"num_views": 3})
    cache = open_cache(world / "c.zarr")
    assert (cache.num_views, len(cache)) == (3, 92)
    grow(world / "c.zarr", add(world / "images", NEW[2:]), views=VIEWS | {"num_views": 3})
    assert verified(world / "c.zarr") == ()


def test_damage_of_a_grown_cache_is_repaired_to_the_same_bytes(grown: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown, tmp_path / "w"))
    sound = contents(root / "c.zarr")
    tables = [name for name in sound if name.startswith("v.logits.basis/c")]
    for name in (
        "t.logits/c.0.2.0",
        "u.logits/c.1.2.0",
        "views.crc32/c.1.2",
        "id/c/0",
        "size/c/0/0",
        "label/c/0",
        *tables,
    ):
        flip(root / "c.zarr" / name, 3)
    assert len(verified(root / "c.zarr")) == 7
    grow(root / "c.zarr", root / "images")
    assert contents(root / "c.zarr") == sound


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "ids of a terabyte": lambda manifest: manifest["appended"].update(id_bytes=1 << 40),
    "no images first": lambda manifest: manifest["appended"]["first"].update(num_images=0),
    "more images first than in all": lambda manifest: manifest["appended"]["first"].update(num_images=10**9),
    "other images first": lambda manifest: manifest["appended"]["first"].update(num_images=89),
    "first images of other names": lambda manifest: manifest["appended"]["first"].update(ids="0" * 64),
    "first images of other classes": lambda manifest: manifest["appended"]["first"].update(num_classes=3),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_beginning_is_refused_without_a_large_allocation(name: str, grown: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(grown / "c.zarr", tmp_path / "c.zarr"))
    forge(cache, FORGERIES[name])
    with taking_at_most(64 << 20), pytest.raises(CacheError):
        open_cache(cache)


def test_ids_of_a_file_that_is_as_large_as_claimed_are_not_read(grown: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(grown / "c.zarr", tmp_path / "c.zarr"))
    os.truncate(cache / "id/c/0", 1 << 40)
    forge(cache, FORGERIES["ids of a terabyte"])
    with taking_at_most(64 << 20), pytest.raises(CacheError, match="4096 each at most"):
        open_cache(cache)


def test_a_note_of_ids_of_a_terabyte_is_refused(world: Path) -> None:
    add(world / "images", NEW)
    grow(world / "c.zarr", world / "images", part="1/2")
    note = world / "c.zarr" / GROWING
    entries = json.loads(note.read_bytes())
    entries["images"]["appended"]["id_bytes"] = 1 << 40
    note.write_text(json.dumps(entries))
    with taking_at_most(64 << 20), pytest.raises(CacheError, match="damaged"):
        grow(world / "c.zarr", world / "images")


def test_parts_together_append_what_one_run_does(world: Path, grown: Path) -> None:
    add(world / "images", NEW)
    for part in ("1/2", "2/2"):
        grow(world / "c.zarr", world / "images", part=part)
    assert contents(world / "c.zarr") == contents(grown / "c.zarr")


@pytest.mark.parametrize("pairing_window", [8, None])
def test_mixed_views_grow_by_whole_windows(pairing_window: int | None, base: Path, tmp_path: Path) -> None:
    views = MIXED | {"pairing_window": pairing_window}
    folder = add(tmp_path / "images", FIRST)
    grow(tmp_path / "c.zarr", folder, "tu", views=views)
    before = open_cache(tmp_path / "c.zarr")
    add(folder, NEW[:11])
    if pairing_window is None:
        with pytest.raises(MismatchError, match=r"(?s)mixes each image with any other.*Fix:.*pairing_window"):
            grow(tmp_path / "c.zarr", folder, "tu", views=views)
        return
    shutil.copytree(tmp_path / "c.zarr", tmp_path / "d.zarr")
    grow(tmp_path / "c.zarr", folder, "tu", views=views)
    assert len(open_cache(tmp_path / "c.zarr")) == 98
    grow(tmp_path / "c.zarr", add(folder, NEW[11:]), "tu", views=views)
    grow(tmp_path / "d.zarr", folder, "tu", views=views)
    after = open_cache(tmp_path / "c.zarr")
    assert len(after) == 90 + 24
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "d.zarr")
    assert verified(tmp_path / "c.zarr") == ()
    assert equal(rows_of(after, 90), rows_of(before, 90))
    mixed = after.views(open_folder(tmp_path))
    keys = [ViewKey(1, index) for index in range(114)]
    partners = [key.index for key in mixed.partners(keys)]
    assert all((one < 90) == (other < 90) for one, other in enumerate(partners))
    assert all((one - 90) // 8 == (other - 90) // 8 for one, other in enumerate(partners) if one >= 90)
    assert torch.equal(
        after.rows(keys)["t"].logits, Linear(2)((mixed.__getitems__(keys).float() / 255 - 0.5) / 0.5).half()
    )


def test_plan_and_inspect_describe_the_growth(world: Path) -> None:
    add(world / "images", NEW)
    before = stamps(world / "c.zarr")
    wanted = recipe(
        world / "c.zarr",
        dataset={"kind": "image_folder", "root": str(world / "images")},
        teachers={name: ENTRIES[name] for name in "tuv"},
        views=VIEWS,
        shard_rows=40,
        batch_size=20,
        row_checksums=True,
        record_parameters=True,
        new_images="append",
    )
    document = plan(wanted, teachers=MODULES, batches=1)
    assert (document["state"], document["images"]) == ("growth", 120)
    assert (document["shards_to_do"], document["row_views_to_do"]) == (2, 60)
    bounds = plan(wanted, teachers=MODULES, probing=False)
    assert (bounds["images"], bounds["shards_to_do"], bounds["row_views_to_do"]) == (120, 2, 60)
    assert stamps(world / "c.zarr") == before
    grow(world / "c.zarr", world / "images")
    found = inspect_cache(world / "c.zarr")
    assert (found["images"], found["first_images"]) == (120, 90)


def test_the_root_of_a_cache_that_never_grew_records_nothing_of_it(base: Path) -> None:
    root = json.loads((base / "c.zarr/zarr.json").read_bytes())
    assert "appended" not in root["attributes"]["logitcache"]["manifest"]
    assert not (base / "c.zarr/id").exists()


def test_errors_are_of_the_library(world: Path) -> None:
    add(world / "images", ["cat/a\nb.png"])
    with pytest.raises(LogitCacheError, match=r"(?s)holds a line break.*Fix: rename it"):
        grow(world / "c.zarr", world / "images")


def shards_of(folder: Path, numbers: Sequence[int]) -> Path:
    """Write tar shards of twenty images each, whose names sort before those that are there."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        with tarfile.open(folder / f"part-{9 - number}.tar", "w") as archive:
            for index in range(20):
                generator, picture = np.random.default_rng([number, index]), io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(picture, "PNG")
                member = tarfile.TarInfo(f"{number}-{index}.png")
                member.size = picture.tell()
                archive.addfile(member, io.BytesIO(picture.getvalue()))
    return folder


class Rows(Pixels):
    """Rows of a table, with ids, which newer rows precede."""

    def __init__(self, count: int) -> None:
        super().__init__(100, 2)
        self.images, self.targets = self.images[:count][::-1], self.targets[:count][::-1]  # type: ignore[index]
        self.ids = [f"row {number}" for number in reversed(range(count))]
        self.classes = ["a", "b"]


@pytest.mark.parametrize("kind", ["shards", "rows"])
def test_shards_and_rows_are_appended_too(kind: str, tmp_path: Path) -> None:
    def answered(steps: int) -> PrecomputeResult:
        given: dict[str, Any] = {"dataset": Rows(50 + 20 * steps)}
        entry = None
        if kind == "shards":
            folder = shards_of(tmp_path / "shards", range(2 + steps))
            entry = {"kind": "webdataset", "shards": str(folder / f"part-{{{8 - steps}..9}}.tar"), "labelled": False}
            given = {}
        wanted = recipe(
            tmp_path / "c.zarr", dataset=entry, new_images="append", shard_rows=16, batch_size=8, views=VIEWS
        )
        return precompute(wanted, teachers={"t": Linear(2)}, **given)

    answered(0)
    before = open_cache(tmp_path / "c.zarr")
    expected = rows_of(before, len(before))
    for steps in (1, 2):
        assert answered(steps).row_views == 2 * 20
    after = open_cache(tmp_path / "c.zarr")
    assert len(after) == len(before) + 40
    assert equal(rows_of(after, len(before)), expected)
    images = Rows(90) if kind == "rows" else None
    pixels = (after.views(images).__getitems__([ViewKey(1, len(after) - 1)]).float() / 255 - 0.5) / 0.5
    assert torch.equal(after.rows([ViewKey(1, len(after) - 1)])["t"].logits, Linear(2)(pixels).half())


def test_an_image_that_changed_since_a_growth_began_is_refused(world: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(world / "c.zarr", add(world / "images", NEW), modules=MODULES | {"v": Interrupting(2, seed=2)})
    before = contents(world / "c.zarr")
    shutil.copy(world / "images/cat/000.png", world / "images" / NEW[4])
    with pytest.raises(MismatchError, match=r"is growing to 120 images, .*Fix: run the same .*gc .* --growth"):
        grow(world / "c.zarr", world / "images")
    assert contents(world / "c.zarr") == before
    collect(world / "c.zarr", growth=True)
    grow(world / "c.zarr", world / "images")
    assert verified(world / "c.zarr") == ()


def test_what_a_finished_growth_left_is_removed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after its last step leaves what was staged."""
    add(world / "images", NEW)
    with monkeypatch.context() as patch:
        patch.setattr("logitcache.cache.write.grow.forget_staged", lambda *_: None)
        patch.setattr("logitcache.stage_one.lifecycle.forget_growth", lambda *_: None)
        grow(world / "c.zarr", world / "images")
    assert (world / "c.zarr/t.logits.staged").is_dir()
    assert verified(world / "c.zarr") == ()
    other = Path(shutil.copytree(world / "c.zarr", world / "d.zarr"))
    collect(other)
    grow(world / "c.zarr", world / "images")
    assert contents(other) == contents(world / "c.zarr")
    assert sorted(os.listdir(other)) == sorted(os.listdir(world / "c.zarr"))
    assert not list(other.glob("*.staged*"))
    assert not list((other / "digest").glob("growing*"))
