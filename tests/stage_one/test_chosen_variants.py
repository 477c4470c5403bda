"""A cache whose teacher answers by a variant that `auto` chose: whatever continues it writes the bytes of one run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.classifier import Variant
from logitcache.config.recipe import dump_recipe
from logitcache.errors import RecipeError
from logitcache.report.verify_and_repair import repair
from logitcache.runtime import versions
from logitcache.stage_one.precompute import PrecomputeRecipe, PrecomputeResult, open_precompute_task, precompute
from logitcache.teacher import answers
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, contents, flip, forge, recipe, shard_files, stamps, teacher, verified
from tests.stage_one.test_growth import same_but_canaries
from tests.teacher.nets import SIDE
from tests.teacher.test_speed import MODEL, gains

FIRST, NEW = [f"m{number:02}" for number in range(20)], [f"{letter}{number}" for letter in "az" for number in range(4)]
"""Names of images: some of the new ones are sorted before the first ones."""

FOLDED = {"channels_last": 1.1, "fold": 1.6, "channels_last and fold": 1.4}
"""Gains by which `auto` takes `fold`."""


def add(folder: Path, names: Sequence[str]) -> Path:
    """Write images, each a function of its name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        generator = np.random.default_rng(list(name.encode()))
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def planned(cache: Path, folder: Path, num_views: int = 2, **changes: Any) -> PrecomputeRecipe:
    pooled = {"kind": "pooled", "tap": "norm", "dtype": "float32", "storage": "packed"}
    kept: dict[str, Any] = {"logits": DENSE32 | {"storage": "packed"}, "features": {"pooled": pooled}}
    return recipe(
        cache,
        dataset={"kind": "image_folder", "root": str(folder), "labelled": False},
        teachers={"t": teacher(**kept, model=MODEL, speed="auto")},
        views={"num_views": num_views, "augmentations": [{"kind": "horizontal_flip"}]},
        **({"shard_rows": 8, "batch_size": 4} | changes),
    )


def run(cache: Path, folder: Path, num_views: int = 2, part: str | None = None, **changes: Any) -> PrecomputeResult:
    return precompute(planned(cache, folder, num_views, **changes), part=part)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add(tmp_path_factory.mktemp("images"), FIRST)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of six shards, made at once."""
    path = tmp_path_factory.mktemp("whole") / "c.zarr"
    with pytest.MonkeyPatch.context() as patch:
        timed = gains(patch, FOLDED)
        run(path, folder)
    assert timed == list(FOLDED)
    assert open_cache(path).manifest.teachers["t"].speed == Variant(fold=True)
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the cache; from now on a variant that is timed is an error."""
    gains(monkeypatch, {})
    return Path(shutil.copytree(whole, tmp_path / "c.zarr"))


def begun(cache: Path) -> Path:
    """Leave the first of the six shards, as a run that was stopped does."""
    for name in ("t.logits", "t.logits.commits", "t.pooled", "t.pooled.commits"):
        for file in shard_files(cache, name)[1:]:
            file.unlink()
    return cache


def test_damage_is_repaired_to_the_same_bytes(cache: Path, whole: Path, folder: Path) -> None:
    (cache.parent / "r.yaml").write_text(dump_recipe(planned(cache, folder)))
    flip(shard_files(cache)[1], 70)
    flip(shard_files(cache, "t.pooled")[2], 70)
    assert len(verified(cache)) == 2
    assert repair(cache, cache.parent / "r.yaml").problems == ()
    assert contents(cache) == contents(whole)


def test_a_run_that_was_stopped_is_continued_to_the_same_bytes(cache: Path, whole: Path, folder: Path) -> None:
    assert run(begun(cache), folder).shards_written == 5
    assert contents(cache) == contents(whole)


def test_parts_choose_once_and_fill_it_with_the_same_bytes(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = gains(monkeypatch, FOLDED)
    assert [run(tmp_path / "c.zarr", folder, part=part).shards_left for part in ("2/2", "1/2")] == [3, 0]
    assert timed == list(FOLDED)
    assert contents(tmp_path / "c.zarr") == contents(whole)


@pytest.mark.usefixtures("warm_workers")
def test_workers_fill_it_with_the_same_bytes(cache: Path, whole: Path, folder: Path) -> None:
    assert precompute(planned(begun(cache), folder), workers=2).shards_written == 5
    assert contents(cache) == contents(whole)


def test_views_are_added_as_one_run_computes_them(
    cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: stamp for name, stamp in stamps(cache).items() if "/c." in name}
    run(cache, folder, num_views=4)
    assert before.items() <= stamps(cache).items()
    gains(monkeypatch, FOLDED)
    run(tmp_path / "once.zarr", folder, num_views=4)
    assert same_but_canaries(cache, tmp_path / "once.zarr")


def test_images_are_appended_with_the_same_bytes_in_any_steps(cache: Path, whole: Path, tmp_path: Path) -> None:
    old, names = rows(cache, len(FIRST)), [*FIRST, *NEW]
    files = []
    for label, stops in (("at once", [28]), ("in steps", [21, 26, 28])):
        path = Path(shutil.copytree(whole, tmp_path / f"{label}.zarr"))
        for stop in stops:
            run(path, add(tmp_path / label, names[:stop]), new_images="append")
        assert open_cache(path).manifest.teachers["t"].speed == Variant(fold=True)
        assert torch.equal(rows(path, len(FIRST)), old)
        files.append({name: data for name, data in contents(path).items() if name != "zarr.json"})
    assert files[0] == files[1]
    assert len(open_cache(path)) == 28


def rows(cache: Path, count: int) -> Tensor:
    keys = [ViewKey(view, index) for view in range(2) for index in range(count)]
    found = open_cache(cache).answers(keys)["t"]
    return torch.cat([found.logits, found.features["pooled"]], dim=1)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be a machine with another release of torch and another CPU."""
    other = dict(versions.versions()) | {"torch": "9.9.9", "cpu": "riscv64 DEFAULT"}
    monkeypatch.setattr(versions, "_versions", lambda: other)


def test_on_another_machine_the_difference_is_named(
    cache: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = versions.versions()
    assert {"torch": here["torch"], "cpu": here["cpu"], "device": "cpu"}.items() <= open_cache(
        whole
    ).manifest.versions.items()
    run(cache, folder)
    assert "another machine" not in caplog.text
    elsewhere(monkeypatch)
    run(begun(cache), folder)
    named = f"made on another machine (torch {here['torch']}, cpu {here['cpu']}); here is torch 9.9.9, cpu riscv64"
    assert named in caplog.text
    assert contents(cache) == contents(whole)  # what made it stays recorded
    caplog.clear()
    with open_precompute_task(planned(cache, folder), open_cache(cache).manifest, 2):
        assert named in caplog.text


def test_another_device_is_named(cache: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    forge(cache, lambda manifest: manifest["versions"].update(device="NVIDIA H200"))
    run(begun(cache), folder)
    assert "made on another machine (device NVIDIA H200); here is device cpu" in caplog.text


def test_a_variant_that_is_another_function_elsewhere_is_refused(
    cache: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "BOUNDS", dict.fromkeys(answers.BOUNDS, 1e-12))
    with pytest.raises(RecipeError, match=r"with fold, \w+ differ by .* Fix: continue on a machine like the one that"):
        run(cache, folder)
    assert contents(cache) == contents(whole)


def test_a_plain_teacher_records_no_device_and_names_no_machine(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gains(monkeypatch, dict.fromkeys(FOLDED, 1.0))
    run(tmp_path / "c.zarr", folder)
    assert "device" not in open_cache(tmp_path / "c.zarr").manifest.versions
    elsewhere(monkeypatch)
    run(tmp_path / "c.zarr", folder)
    assert "another machine" not in caplog.text
