"""Image folders at URLs: the same data set as the same folder on a disk, read once, and late answers hidden."""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cache.cache import open_cache
from logitcache.errors import DataError, RecipeError, RemoteError
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.remote import client
from logitcache.views.datasets import ImageFolder
from logitcache.views.datasets.base import fingerprint
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.objects import Bucket, bucket
from tests.views.archives import photograph, written

# Folders whose names order otherwise than their paths, hidden files, and files that are no images.
NAMES = [
    *("cat/z.png", "cat/a.PNG", "cat/in/b.png", "cat/in-b/a.png", "cat/in.d/a.png", "cat-a/ä.png", "Dog/b.png"),
    *("Dog/.hidden.png", ".trash/a.png", "cat/notes.txt", "cat/.in/a.png"),
]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def s3() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.fixture
def pets(tmp_path: Path, s3: Bucket) -> Path:
    """A folder, which is also at pets/ of the bucket."""
    for number, name in enumerate(NAMES):
        written(tmp_path, name, photograph(number))
        s3.put(f"pets/{name}", photograph(number))
    s3.put("pets/cat/", b"")  # as consoles mark folders
    s3.put("pets-of-others/a.png", b"")
    return tmp_path


def at(s3: Bucket, folder: str = "pets", **fields: object):
    return ImageFolder(root=f"{s3.url}/{folder}", **fields).open()


def fetched(s3: Bucket) -> list[str]:
    return [seen.path.rpartition("pets/")[2] for seen in s3.front.asked("GET") if seen.path.endswith(("png", "PNG"))]


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"labelled": True}, 7), ({"labelled": False}, 7), ({"labelled": True, "split": "train", "holdout": 3}, 4)],
)
def test_a_folder_is_the_same_on_a_disk_and_at_a_url(
    pets: Path, s3: Bucket, fields: dict[str, Any], count: int
) -> None:
    local, here = ImageFolder(root=str(pets), **fields).open(), at(s3, **fields)
    assert len(local.ids) == count
    assert list(here.ids) == list(local.ids)
    assert here.labels.tolist() == local.labels.tolist()
    assert here.class_names == local.class_names
    assert here.num_classes == local.num_classes
    assert fingerprint(here) == fingerprint(local)
    assert np.array_equal(here.digests(), local.digests())
    every = range(len(local.ids))
    for index, image in zip(every, here.read_batch(every), strict=True):
        assert torch.equal(image, local.read(index))
        assert torch.equal(image, here.read(index))


def test_images_right_in_the_root_have_no_labels(s3: Bucket) -> None:
    for name in ("b.png", "a.png"):
        s3.put(f"pets/{name}", photograph(1))
    with pytest.raises(DataError, match="labelled: true"):
        at(s3, labelled=True)
    found = at(s3)
    assert list(found.ids) == ["a.png", "b.png"]
    assert found.labels.tolist() == [-1, -1]
    assert (found.num_classes, found.class_names) == (None, None)


def test_a_second_opening_reads_what_has_changed_alone(pets: Path, s3: Bucket) -> None:
    before = fingerprint(at(s3))
    assert sorted(fetched(s3)) == sorted(name for name in NAMES[:7])  # digest and size take one request
    s3.front.seen.clear()
    assert fingerprint(at(s3)) == before
    assert fetched(s3) == []
    s3.put("pets/cat/z.png", photograph(99))
    s3.put("pets/cat/new.png", photograph(100))
    s3.front.seen.clear()
    after = at(s3)
    assert fingerprint(after) != before
    assert sorted(fetched(s3)) == ["cat/new.png", "cat/z.png"]
    written(pets, "cat/z.png", photograph(99))
    written(pets, "cat/new.png", photograph(100))
    assert fingerprint(after) == fingerprint(ImageFolder(root=str(pets)).open())


def test_a_first_pass_that_ends_early_is_not_lost(pets: Path, s3: Bucket) -> None:
    s3.front.fail(1.0, "403", picked=lambda request: "cat-a" in request.target)
    with pytest.raises(RemoteError, match="cat-a"):
        at(s3).digests()
    s3.front.fail(0.0)
    s3.front.seen.clear()
    at(s3).digests()
    assert fetched(s3) == ["cat-a/ä.png"]


def test_faults_that_pass_change_nothing(pets: Path, s3: Bucket) -> None:
    s3.front.fail(0.2, "500", "503", "cut", seed=1)
    here = at(s3)
    assert fingerprint(here) == fingerprint(ImageFolder(root=str(pets)).open())
    assert s3.front.asked(failed=True)


def test_the_answers_of_a_batch_are_awaited_together(s3: Bucket) -> None:
    count, latency = 64, 0.1
    for number in range(count):
        s3.put(f"pets/{number:02d}.png", photograph(number))
    here = at(s3)
    s3.front.latency = latency
    s3.front.seen.clear()
    start = time.perf_counter()
    views = Views(here, ViewSpec())
    images = [here.read(0), *here.read_batch(range(1, count))]
    seconds = time.perf_counter() - start
    assert len(s3.front.asked("GET")) == count
    assert s3.front.most_at_once > client.REQUESTS / 2
    assert seconds < count * latency / 1.5
    assert torch.equal(views[ViewKey(0, 9)], images[9])


def test_forked_workers_of_a_loader_connect_by_themselves(pets: Path, s3: Bucket) -> None:
    same = {"labelled": False}
    here, local = at(s3, **same), ImageFolder(root=str(pets), **same).open()
    fingerprint(here)
    batches = [[ViewKey(0, index)] for index in range(4)]
    loader = ViewLoader(Views(here, ViewSpec()), 1, "fork")
    try:
        for (key,), images in zip(batches, loader.render(batches), strict=True):
            assert torch.equal(images[0], local.read(key.index))
    finally:
        loader.close()


def test_a_data_set_that_was_sent_elsewhere_connects_there(pets: Path, s3: Bucket) -> None:
    sent = pickle.dumps(at(s3))
    assert fingerprint(pickle.loads(sent)) == fingerprint(ImageFolder(root=str(pets)).open())


class Mean(nn.Module):
    """A teacher of two classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))[:, :2]


def test_a_cache_of_a_folder_serves_the_same_folder_at_a_url(pets: Path, s3: Bucket, tmp_path: Path) -> None:
    recipe = PrecomputeRecipe.model_validate_json(
        f"""{{"cache": "{tmp_path}/c.zarr", "dataset": {{"kind": "image_folder", "root": "{pets}", "labelled": false}},
        "views": {{"num_views": 2, "augmentations": [{{"kind": "random_resized_crop", "size": 6}}]}},
        "teachers": {{"t": {{"preprocessing": {{"mean": [0, 0, 0], "std": [1, 1, 1]}}}}}},
        "num_workers": 0, "device": "cpu"}}"""
    )
    precompute(recipe, teachers={"t": Mean()})
    cache = open_cache(tmp_path / "c.zarr")
    there = ImageFolder(root=f"{s3.url}/pets", labelled=False)
    keys = [ViewKey(1, index) for index in range(7)]
    s3.front.seen.clear()
    assert torch.equal(cache.views(there).__getitems__(keys), cache.views().__getitems__(keys))
    s3.put("pets/cat/z.png", photograph(50))
    with pytest.raises(ValueError, match=r"(?s)other images.*1 of 7 images changed: 'cat/z\.png'"):
        cache.views(there)


@pytest.mark.parametrize(
    ("changed", "scanned"),
    [
        *((photograph(0)[:-9], scanned) for scanned in (True, False)),
        *((b"", scanned) for scanned in (True, False)),
        *((None, scanned) for scanned in (True, False)),
        (photograph(0)[:-1] + b"x", True),  # where nobody knows its digest yet, it will be that of what is there now
        (photograph(99, "BMP"), True),
    ],
    ids=lambda value: str(value) if value in (True, False) else f"{len(value) if value else value} bytes",
)
def test_an_image_that_changes_after_the_opening_is_refused_when_it_is_read(
    pets: Path, s3: Bucket, changed: bytes | None, scanned: bool
) -> None:
    here = at(s3)
    if scanned:
        here.digests()
    index = list(here.ids).index("cat/z.png")
    if changed is None:
        s3.remove("pets/cat/z.png")
    else:
        s3.put("pets/cat/z.png", changed)
    for use in (lambda: here.read(index), lambda: here.read_batch([0, index]), here.digests):
        if not scanned or use != here.digests:
            with pytest.raises(DataError, match=r"pets/cat/z\.png'.*(changed|not there)(.|\n)*Fix:"):
                use()


@pytest.mark.parametrize(
    ("objects", "folder", "message"),
    [
        ([], "pets", "no images in 's3://.*/pets'"),
        (["pets/a.txt"], "pets", "no images"),
        (["pets/a.png"], "pets/a.png", "is a file, not a folder"),
        (["pets/cat/a.png", "pets/b.png"], "pets", "class folders .'cat'. and images of no class .'b.png'"),
        (["pets/cat/a.png", "pets/dog/a.txt"], "pets", "without an image in .*'dog'"),
        (["pets/train/a.png", "pets/val/a.png"], "pets", r"splits.*Fix: set root: s3://.*/pets/train"),
        (["pets/cat/a.heic"], "pets", r"pets/cat/a\.heic' is an image of a type"),
    ],
)
def test_a_folder_that_is_empty_or_ambiguous_is_refused(
    s3: Bucket, objects: list[str], folder: str, message: str
) -> None:
    for key in objects:
        s3.put(key, b"x")
    with pytest.raises(DataError, match=f"(?s){message}"):
        at(s3, folder)


def test_an_object_that_is_no_image_is_refused_by_its_url(s3: Bucket) -> None:
    for name, data in (("a.png", b"<html>404</html>"), ("b.png", b"")):
        s3.put(f"{name[0]}/{name}", data)
        for use in (lambda found: found.read(0), lambda found: found.sizes()):
            with pytest.raises(
                DataError, match=rf"{s3.url}/{name[0]}/{name}' cannot be read: cannot identify its format"
            ):
                use(at(s3, name[0]))


def test_a_web_server_cannot_be_listed(s3: Bucket) -> None:
    with pytest.raises(RecipeError, match=r"cannot be listed(.|\n)*webdataset"):
        ImageFolder(root="http://127.0.0.1:1/pets").open()


def test_what_the_storage_refuses_is_no_fault_of_an_image(pets: Path, s3: Bucket) -> None:
    here = at(s3)
    s3.front.fail(1.0, "403")
    with pytest.raises(RemoteError, match="cannot read it"):
        here.read(0)
