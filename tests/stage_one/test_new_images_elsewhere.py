"""Images are appended by workers, in object storage, and to what further commands read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.cache.pairs.pair import pair
from logitcache.cache.snapshot import open_snapshot
from logitcache.errors import MismatchError
from logitcache.report.inspect import inspect_cache
from logitcache.stage_one.derive.derive import DeriveRecipe, derive
from logitcache.stage_one.materialize.materialize import materialize
from logitcache.stage_one.precompute import precompute
from logitcache.store.mirrors_folder import FOLDER
from logitcache.views.keys import ViewKey
from tests.cache.made import TOP2_PACKED, contents, recipe, verified
from tests.objects import Bucket, bucket
from tests.stage_one.test_new_images import ENTRIES, FIRST, NEW, VIEWS, add, equal, open_folder, rows_of

MODEL = {"kind": "custom", "factory": "tests.cache.made:Linear"}


def wanted(cache: Any, folder: Path, **changes: Any) -> Any:
    models = {name: MODEL | {"arguments": {"num_classes": 2, "seed": seed}} for seed, name in enumerate("tu")}
    return recipe(
        cache,
        dataset={"kind": "image_folder", "root": str(folder)},
        teachers={name: ENTRIES[name] | {"model": models[name]} for name in "tu"},
        new_images="append",
        views=VIEWS,
        shard_rows=40,
        batch_size=20,
        **changes,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the first images, and a cache of them."""
    root = tmp_path_factory.mktemp("base")
    precompute(wanted(root / "c.zarr", add(root / "images", FIRST)))
    return root


@pytest.fixture(scope="module")
def grown(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cache after new images came to the folder."""
    path = Path(shutil.copytree(base / "c.zarr", tmp_path_factory.mktemp("grown") / "c.zarr"))
    precompute(wanted(path, add(base / "images", NEW)))
    return path


@pytest.mark.usefixtures("warm_workers")
def test_workers_append_the_same_bytes(base: Path, grown: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(base / "c.zarr", tmp_path / "c.zarr"))
    assert precompute(wanted(path, base / "images"), workers=1).shards_left == 0
    assert contents(path) == contents(grown)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    with bucket() as found:
        yield found


def test_storage_grows_to_the_same_bytes_and_open_readers_keep_what_they_opened(
    store: Bucket, base: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, few = f"{store.url}/c.zarr", add(tmp_path / "images", FIRST)
    precompute(wanted(url, few))
    old, expected = open_cache(url), rows_of(open_cache(base / "c.zarr"), 90)
    precompute(wanted(url, add(few, NEW[:12])))
    between = open_cache(url)
    precompute(wanted(url, add(few, NEW[12:])))
    assert (len(old), len(between), len(open_cache(url))) == (90, 102, 120)
    assert equal(rows_of(old, 90), expected)
    assert equal(rows_of(between, 90), expected)
    monkeypatch.setenv(FOLDER, str(tmp_path / "others"))
    assert verified(url) == ()  # type: ignore[arg-type]
    assert equal(rows_of(open_cache(url), 120), rows_of(open_cache(grown), 120))
    assert sorted(store.contents("c.zarr")) == sorted(contents(grown))


def test_a_cache_that_grew_is_derived_from_and_looked_at(base: Path, grown: Path, tmp_path: Path) -> None:
    made = derive(
        DeriveRecipe(cache=str(grown), out=str(tmp_path / "d.zarr"), teachers={"t": {"logits": TOP2_PACKED}})  # type: ignore[dict-item]
    )
    assert made.shards_left == 0
    derived = open_cache(tmp_path / "d.zarr")
    assert verified(tmp_path / "d.zarr") == ()
    assert list(derived.views(open_folder(base)).dataset.ids) == [*FIRST, *NEW]
    keys = [ViewKey(0, index) for index in (3, 95, 119)]
    assert torch.equal(derived.rows(keys)["t"].logits.argmax(1), open_cache(grown).rows(keys)["t"].logits.argmax(1))
    assert inspect_cache(grown)["first_images"] == 90


def test_views_of_a_cache_that_grew_are_written_in_its_order(base: Path, grown: Path, tmp_path: Path) -> None:
    found = materialize(str(grown), str(tmp_path / "views"), form="npz", pixels="raw", num_workers=0)
    assert found.views == 2 * 120


def test_a_pairing_of_the_first_images_is_refused_after_growth(base: Path, grown: Path, tmp_path: Path) -> None:
    pair(grown, tmp_path / "new", open_folder(base))
    few = only_first(base, tmp_path)
    pair(base / "c.zarr", tmp_path / "old", few, teacher_dataset=few)
    open_cache(grown).pairing(tmp_path / "new")
    with pytest.raises(MismatchError, match="the images"):
        open_cache(grown).pairing(tmp_path / "old")
    open_cache(grown).first(90).pairing(tmp_path / "old")


def only_first(base: Path, folder: Path) -> Any:
    for name in FIRST:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(base / "images" / name, folder / "images" / name)
    return open_folder(folder)


def test_the_manifest_of_each_step_follows_from_the_last(base: Path, grown: Path) -> None:
    first = open_cache(grown).first(90)
    assert first.manifest.content_digest() == open_snapshot(base / "c.zarr").manifest.content_digest()
