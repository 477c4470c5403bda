"""What a cache records of the views themselves: checksums and parameters, committed by shard like answers."""

import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from logitcache.cache.cache import Cache, open_cache
from logitcache.cache.format.manifest import Manifest
from logitcache.cache.snapshot import open_snapshot
from logitcache.errors import CacheError, MismatchError, RecipeError, ReplayMismatchError
from logitcache.report.inspect import inspect_cache
from logitcache.report.verify_and_repair import verify
from logitcache.views.augmentations import HorizontalFlip
from logitcache.views.checksums import require_rows
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec
from tests.cache.made import (
    COUNT,
    FLIP_AND_CROP,
    Linear,
    Pixels,
    contents,
    flip,
    recipe,
    run,
    stamps,
    teacher,
    verified,
    write_images,
)
from tests.stage_one.runs import partial

BOTH = {"row_checksums": True, "record_parameters": True}
KEYS = [ViewKey(view, index) for view in range(2) for index in range(COUNT)]
FEW = [ViewKey(1, 299), ViewKey(0, 0), ViewKey(1, 128), ViewKey(0, 127), ViewKey(1, 299)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "c.zarr"
    run(path, Pixels(COUNT), shard_rows=128, **BOTH)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage: six shards of answers, checksums and parameters."""
    return Path(shutil.copytree(sound, tmp_path / "c.zarr"))


def mend(path: Path) -> int:
    return run(path, Pixels(COUNT), shard_rows=128, **BOTH).shards_written


def flipped_the_other_way(self: Any, draws: Any, ordinal: int, sizes: Any, real: Any = HorizontalFlip.plan) -> Any:
    """Plan as another release of the library might."""
    params, sizes = real(self, draws, ordinal, sizes)
    return 1 - params, sizes


def test_checksums_are_those_of_the_pixels_that_the_teacher_saw(sound: Path) -> None:
    opened = open_cache(sound)
    pixels = opened.views(Pixels(COUNT)).__getitems__(KEYS)
    wanted = np.array([zlib.crc32(image.numpy().tobytes()) for image in pixels], np.uint32)
    found = opened.row_checksums(KEYS)
    assert found is not None
    assert found.dtype == np.uint32
    assert np.array_equal(found, wanted)
    assert np.array_equal(np.asarray(zarr.open_group(sound, mode="r")["views.crc32"][...]).reshape(-1), wanted)


def test_parameters_are_those_that_were_planned(sound: Path) -> None:
    opened = open_cache(sound)
    spec = opened.manifest.views
    found = opened.parameters(KEYS)
    assert found is not None
    assert opened.manifest.parameters == spec.columns()
    assert found.dtype == np.int64
    planned = np.concatenate(spec.plan(KEYS, np.full((len(KEYS), 2), 4))[0], axis=1)
    assert np.array_equal(found, planned)
    assert len(np.unique(found, axis=0)) > 10
    with xarray.open_zarr(sound) as stored:
        assert stored["views.parameters"].dims == ("view", "sample", "views.parameter")
        assert np.array_equal(stored["views.parameters"].values.reshape(found.shape), found)
        assert stored["views.crc32"].dims == ("view", "sample")


def test_rows_come_in_the_order_of_the_keys(sound: Path) -> None:
    opened = open_cache(sound)
    for read in (opened.row_checksums, opened.parameters):
        whole, few = read(KEYS), read(FEW)
        assert whole is not None
        assert few is not None
        assert np.array_equal(few, whole[[KEYS.index(key) for key in FEW]])
        assert read([]) is not None
        with pytest.raises(IndexError):
            read([ViewKey(2, 0)])


def test_a_cache_without_them_says_so(tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(20))
    opened = open_cache(tmp_path / "c.zarr")
    assert opened.row_checksums(KEYS[:3]) is None
    assert opened.parameters(KEYS[:3]) is None
    assert not list(opened.path.glob("views.*"))
    opened.require_parameters(opened.views(Pixels(20)))
    with pytest.raises(RecipeError, match="keeps no parameters to replay: it was made without them"):
        opened.views(Pixels(20), replay="recorded")


def test_views_without_augmentations_have_no_parameters_to_record(tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(20), views={"num_views": 2}, record_parameters=True)
    opened = open_cache(tmp_path / "c.zarr")
    found = opened.parameters(KEYS[:3])
    assert found is not None
    assert found.shape == (3, 0)
    assert not list(opened.path.glob("views.*"))
    with pytest.raises(RecipeError, match="its views have none"):
        opened.views(Pixels(20), replay="recorded")


@pytest.mark.parametrize("name", ["row_checksums", "record_parameters"])
def test_each_may_be_recorded_alone(name: str, tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(20), **{name: True})
    opened = open_cache(tmp_path / "c.zarr")
    assert len(opened.layout.views_arrays) == 1
    assert (opened.row_checksums(KEYS[:2]) is None) == (name != "row_checksums")
    assert (opened.parameters(KEYS[:2]) is None) == (name != "record_parameters")
    assert verified(opened.path) == ()


@pytest.mark.parametrize("changes", [{"row_checksums": True}, {"record_parameters": True}, {}])
def test_a_cache_is_not_continued_with_other_records(changes: dict[str, Any], sound: Path) -> None:
    before = stamps(sound)
    with pytest.raises(MismatchError, match=r"row_checksums: the cache has True|parameters: the cache has \["):
        run(sound, Pixels(COUNT), shard_rows=128, **changes)
    assert stamps(sound) == before


@pytest.mark.parametrize("batches", [1, 4, 8])
def test_an_interrupted_run_continues_to_identical_bytes(batches: int, sound: Path, tmp_path: Path) -> None:
    partial(tmp_path / "c.zarr", Pixels(COUNT), batches, **BOTH)
    assert mend(tmp_path / "c.zarr") > 0
    assert contents(tmp_path / "c.zarr") == contents(sound)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "checksum": lambda root: flip(root / "views.crc32/c.1.1", 40),
    "parameter": lambda root: flip(root / "views.parameters/c.1.1.0", 40),
    "record": lambda root: flip(root / "views.commits/c.1.1.0.0", 60),
    "missing": lambda root: (root / "views.crc32/c.1.1").unlink(),
    "answer": lambda root: flip(root / "t.logits/c.1.1.0", 40),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_written_again(damage: str, cache: Path, sound: Path) -> None:
    open_cache(cache)
    before = stamps(cache)
    DAMAGES[damage](cache)
    with pytest.raises(CacheError, match=r"view 1 rows 128\.\.256"):
        open_cache(cache)
    assert len(verified(cache)) == 1
    assert mend(cache) == 1
    assert contents(cache) == contents(sound)
    changed = {name for name, stamp in stamps(cache).items() if before[name] != stamp and (cache / name).is_file()}
    of_views = {"views.crc32/c.1.1", "views.parameters/c.1.1.0", "views.commits/c.1.1.0.0"}
    of_logits = {"t.logits/c.1.1.0", "t.logits.errors/c.1.1.0.0", "t.logits.commits/c.1.1.0.0"}
    assert changed == (of_logits if damage == "answer" else of_views)


@pytest.mark.parametrize("group", ["t.logits", "views"])
def test_a_shard_counts_once_everything_of_it_is_committed(group: str, cache: Path, sound: Path) -> None:
    (cache / f"{group}.commits/c.1.2.0.0").unlink()
    with pytest.raises(CacheError, match="is incomplete: 1 of 6 shards are not committed"):
        open_cache(cache)
    assert mend(cache) == 1
    assert contents(cache) == contents(sound)


def test_no_teacher_takes_their_name(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'views' names what a cache records"):
        recipe(tmp_path / "c.zarr", teachers={"views": teacher()})
    stored = open_cache(sound).manifest.model_dump(mode="json")
    with pytest.raises(ValueError, match="'views' names what a cache records"):
        Manifest.model_validate_json(json.dumps(stored | {"teachers": {"views": stored["teachers"]["t"]}}))


def test_inspect_tells_their_bytes(sound: Path) -> None:
    found = inspect_cache(sound)["recorded"]
    for name, size in found["array_bytes"].items():
        assert size == sum(file.stat().st_size for file in (sound / name).glob("c.*")) > 0
    assert list(found["array_bytes"]) == ["views.crc32", "views.parameters"]
    assert found["bytes_per_row"] == round(sum(found["array_bytes"].values()) / len(KEYS), 1)


def test_batches_of_a_loader_are_compared_row_by_row(sound: Path) -> None:
    opened = open_cache(sound)
    loader = opened.loader(batch_size=70, dataset=Pixels(COUNT))
    ids = loader.views.dataset.ids
    for batch in loader.epoch(1):
        keys = [ViewKey(view, index) for view, index in batch.keys.tolist()]
        recorded = opened.row_checksums(keys)
        assert recorded is not None
        require_rows(batch.images, keys, recorded, ids)
        batch.images[5, 1, 2, 3] ^= 1
        with pytest.raises(ReplayMismatchError, match=f"image {ids[keys[5].index]!r}"):
            require_rows(batch.images, keys, recorded, ids)


def test_plans_of_another_release_are_refused_and_the_recorded_ones_replayed(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_cache(sound)
    pixels = opened.views(Pixels(COUNT)).__getitems__(KEYS)
    monkeypatch.setattr(HorizontalFlip, "plan", flipped_the_other_way)
    with pytest.raises(ReplayMismatchError, match=r"plans 0/32 equal.*(?s:.)*replay: recorded"):
        opened.views(Pixels(COUNT))
    views = opened.views(Pixels(COUNT), replay="recorded")
    assert bool((views.__getitems__(KEYS) == pixels).all())
    planned = Views(views.dataset, opened.manifest.views).__getitems__(KEYS)
    assert not bool((planned == pixels).all())


def test_workers_replay_recorded_parameters(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_cache(sound)
    pixels = opened.views(Pixels(COUNT)).__getitems__(KEYS)
    monkeypatch.setattr(HorizontalFlip, "plan", flipped_the_other_way)
    # Forked ones have the changed plan, and a parent that has read the array before.
    loader = opened.loader(100, 2, dataset=Pixels(COUNT), start_method="fork", replay="recorded")
    for batch in loader.epoch(0):
        rows = [KEYS.index(ViewKey(view, index)) for view, index in batch.keys.tolist()]
        assert bool((batch.images == pixels[rows]).all())


def test_mixtures_are_recorded_and_replayed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = [{"kind": "mixup", "p": 0.5}, {"kind": "cutmix", "p": 0.5}]
    run(
        tmp_path / "c.zarr",
        Pixels(60),
        views={"num_views": 2, "augmentations": FLIP_AND_CROP, "mixing": mixing},
        **BOTH,
    )
    opened = open_cache(tmp_path / "c.zarr")
    keys = [ViewKey(view, index) for view in range(2) for index in range(60)]
    views = opened.views(Pixels(60))
    pixels = views.__getitems__(keys)
    require_rows(pixels, keys, opened.row_checksums(keys), views.dataset.ids)  # type: ignore[arg-type]
    opened.require_parameters(views)

    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("drawn again")

    for name in ("plan", "mixture", "partners"):
        monkeypatch.setattr(ViewSpec, name, forbidden)
    assert bool((opened.views(Pixels(60), replay="recorded").__getitems__(keys) == pixels).all())


def test_recorded_rows_are_pickled_by_their_place_and_their_records(sound: Path) -> None:
    views = open_cache(sound).views(Pixels(COUNT), replay="recorded")
    assert views.recorded is not None
    rows = views.recorded(KEYS)
    data = pickle.dumps(views.recorded)
    assert len(data) < 2000  # each array and shard has a record of 40 bytes
    assert np.array_equal(pickle.loads(data)(KEYS), rows)


def test_verify_plans_every_key_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, root = tmp_path / "c.zarr", write_images(tmp_path / "images", {"a": 40})
    run(path, None, Linear(1), dataset={"kind": "image_folder", "root": str(root)}, **BOTH)
    assert verify(path).images == "the same"
    opened = Cache(open_snapshot(path))
    canaries = {canary.index for canary in opened.manifest.canaries if canary.view == 1}
    index = next(index for index in range(40) if index not in canaries)

    def plan(self: Any, draws: Any, ordinal: int, sizes: Any, real: Any = HorizontalFlip.plan) -> Any:
        params, sizes = real(self, draws, ordinal, sizes)
        params[(draws.indices == index) & (draws.views == 1)] ^= 1
        return params, sizes

    monkeypatch.setattr(HorizontalFlip, "plan", plan)
    opened.views()
    with pytest.raises(ReplayMismatchError, match=f"view 1 of image 'a/{index:03d}.png'.*planned in another way"):
        verify(path)
    monkeypatch.setattr(type(opened.manifest.views), "columns", lambda self: ("other",))
    with pytest.raises(ReplayMismatchError, match=r"this release plans \['other'\]"):
        verify(path)
    with pytest.raises(ReplayMismatchError, match=r"this release replays \['other'\]"):
        opened.views(replay="recorded")
