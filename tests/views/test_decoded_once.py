"""Small images of files are decoded once for a machine: the same bytes, within a bound, and nothing is left behind."""

import errno
import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from logitcache.config.recipe import load_recipe
from logitcache.errors import DataError
from logitcache.store import shared_memory
from logitcache.store.shared_memory import VARIABLE
from logitcache.views.datasets import ImageFolder, WebDataset
from logitcache.views.datasets.image_folder import FolderImages
from logitcache.views.datasets.images import image_files
from logitcache.views.decoded_once import SharedImages, decoded_once
from logitcache.views.keys import ViewKey
from logitcache.views.loader import StartMethod, ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.cache.made import contents, run
from tests.objects import bucket
from tests.stage_one.apart import until
from tests.views.archives import tarred, written
from tests.views.images import textured
from tests.warm import Program

COUNT = 40
KEYS = [[ViewKey(view, (7 * start + place) % COUNT) for place in range(8)] for view in range(2) for start in range(5)]
CROP = [{"kind": "random_resized_crop", "size": 12}, {"kind": "horizontal_flip"}]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of shared memory of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(VARIABLE, "64M")
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path)
    yield tmp_path / f"logitcache-{os.getuid()}"
    shared_memory.leave()


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are decoded in this process."""
    names: list[str] = []
    decode = image_files.decode

    def counted(file: Any, mode: Any, name: str, *options: Any) -> Tensor:
        names.append(name)
        return decode(file, mode, name, *options)

    monkeypatch.setattr(image_files, "decode", counted)
    return names


def write(root: Path, one_size: bool = True, form: str = "JPEG") -> Path:
    for number in range(COUNT):
        height, width = (16, 20) if one_size else (13 + number % 5, 30 - number % 7)
        pixels = textured(1, height, width, seed=number)[0].permute(1, 2, 0).numpy()
        path = root / f"{number % 3}/{number:02}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def views_of(root: Path, mode: Any = "RGB", **spec: Any) -> Views:
    fields = {"num_views": 2, "augmentations": CROP, **spec}
    return Views(ImageFolder(root=str(root), mode=mode).open(), load_recipe(fields, ViewSpec))


def shared(views: Views) -> SharedImages:
    images = decoded_once(views).images
    assert isinstance(images, SharedImages)
    return images


@pytest.mark.parametrize(("num_workers", "start_method"), [(0, "fork"), (2, "fork"), (1, "forkserver")])
@pytest.mark.parametrize("one_size", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_bytes_are_those_of_decoding_for_each_view(
    one_size: bool, mode: str, num_workers: int, start_method: StartMethod, tmp_path: Path
) -> None:
    views = views_of(write(tmp_path / "in", one_size), mode)
    expected = [views.__getitems__(keys) for keys in KEYS]
    loader = ViewLoader(views, num_workers, start_method)
    try:
        for _ in range(2):
            assert all(map(torch.equal, loader.render(KEYS), expected))
    finally:
        loader.close()
    images = shared(views)
    for index in range(COUNT):
        plain = views.images.read(index)
        for _ in range(2):  # decoded, and from the memory
            found = images.read(index)
            assert torch.equal(found, plain)
            assert found.stride() == plain.stride()


def test_each_image_is_decoded_once_by_whoever_reads_it_first(tmp_path: Path, decodes: list[str]) -> None:
    root = write(tmp_path / "in")
    every = [[ViewKey(view, index) for index in range(COUNT)] for view in range(2)]
    for _ in range(2):  # as two runs on a machine
        loader = ViewLoader(views_of(root))
        list(loader.render(every))
        loader.close()
    assert len(decodes) == COUNT
    members = [(f"{path.stem}.jpeg", path.read_bytes()) for path in sorted(root.rglob("*.jpeg"))]
    written(tmp_path, "a.tar", tarred(members))
    shards = WebDataset(shards=str(tmp_path / "a.tar")).open()
    images = shared(Views(shards, ViewSpec()))
    assert len(images.read_batch(range(COUNT))) == COUNT
    assert len(decodes) == COUNT  # the same files in the same order
    assert shared(views_of(root, "L")).read(0).shape[0] == 1
    assert len(decodes) == COUNT + 1


def test_images_at_a_url_are_fetched_once(tmp_path: Path) -> None:
    root = write(tmp_path / "in")
    with bucket() as s3:
        for path in root.rglob("*.jpeg"):
            s3.put(f"in/{path.relative_to(root)}", path.read_bytes())
        dataset = ImageFolder(root=f"{s3.url}/in").open()
        views = Views(dataset, ViewSpec())
        assert decoded_once(views) is views  # not read yet, and a scan reads all
        dataset.digests()
        images = shared(views)
        first = images.read_batch(range(COUNT))
        asked = len(s3.front.asked("GET"))
        assert all(map(torch.equal, shared(Views(dataset, ViewSpec())).read_batch(range(COUNT)), first))
        assert len(s3.front.asked("GET")) == asked


def test_reduced_photographs_are_kept_reduced(tmp_path: Path) -> None:
    root = write(tmp_path / "in", one_size=False)
    scaled, full = (views_of(root, augmentations=[{"kind": "resize", "size": 6}], decode=d) for d in ("scaled", "full"))
    reduced, whole = shared(scaled), shared(full)
    assert reduced.num_bytes < whole.num_bytes / 2
    for _ in range(2):
        assert all(torch.equal(reduced.read(index), scaled.images.read(index)) for index in range(COUNT))
        assert all(torch.equal(whole.read(index), full.images.read(index)) for index in range(COUNT))


@pytest.mark.parametrize("left", ["pixels", "mark", "both"])
def test_what_a_killed_process_wrote_in_part_is_decoded_again(tmp_path: Path, memory: Path, left: str) -> None:
    views = views_of(write(tmp_path / "in"))
    images = shared(views)
    (file,) = memory.iterdir()
    size = 16 * 20 * 3
    with open(file, "r+b") as part:
        if left != "mark":
            part.seek(4 * COUNT + 5 * size)
            part.write(b"x" * (size // 2))
        if left != "pixels":
            part.seek(4 * 5)
            part.write(b"mark")
    assert torch.equal(images.read(5), views.images.read(5))
    again = shared(views)
    assert torch.equal(again.read_batch([4, 5, 6])[1], views.images.read(5))


def test_a_file_that_changes_is_not_kept(tmp_path: Path, decodes: list[str]) -> None:
    root = write(tmp_path / "in")
    images, other = shared(views_of(root)), root / "0/00.jpeg"
    before, expected = other.read_bytes(), images._files.read(0)
    Image.new("RGB", (20, 16)).save(other)
    assert images.read(0).max() == 0
    other.write_bytes(before)
    assert torch.equal(images.read(0), expected)
    assert torch.equal(shared(views_of(root)).read(0), expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_memory_is_told_and_costs_only_time(
    number: int, tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = views_of(write(tmp_path / "in"))
    expected = [views.__getitems__(keys) for keys in KEYS]
    views.dataset.digests()

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.warns(UserWarning, match=f"{os.strerror(number)}.*Fix: a larger /dev/shm"):
            loader = ViewLoader(views)
    assert all(map(torch.equal, loader.render(KEYS), expected))
    assert list(memory.iterdir()) == []


def test_a_memory_that_fills_up_later_costs_only_time(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = views_of(write(tmp_path / "in"))
    images = shared(views)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        assert torch.equal(images.read(3), views.images.read(3))


def test_only_what_fits_half_the_bound_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = views_of(write(tmp_path / "in"))
    size = shared(views).num_bytes
    assert size == COUNT * (4 + 16 * 20 * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bound, fits in ((2 * size, True), (2 * size - 1, False), (0, False)):
            monkeypatch.setenv(VARIABLE, str(bound))
            assert (decoded_once(views) is not views) == fits


def test_files_of_a_large_set_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = views_of(write(tmp_path / "in"))
    monkeypatch.setenv(VARIABLE, "1K")

    def looked(self: FolderImages) -> np.ndarray:
        raise AssertionError("the header of every file")

    monkeypatch.setattr(FolderImages, "heads", looked)
    monkeypatch.setattr(FolderImages, "digests", looked)
    assert decoded_once(views) is views


@pytest.mark.parametrize("index", [0, 7])
def test_a_file_that_cannot_be_read_is_named_as_it_is_rendered(tmp_path: Path, index: int) -> None:
    root = write(tmp_path / "in")
    views = views_of(root)
    broken = Path(views.dataset.shown(index))  # type: ignore[attr-defined]
    broken.write_bytes(b"no image")
    loader = ViewLoader(views)
    with pytest.raises(DataError, match=broken.name):
        list(loader.render([[ViewKey(0, index)]]))
    broken.unlink()
    with pytest.raises(DataError, match=f"(?s){broken.name}.*put it back"):
        list(loader.render([[ViewKey(0, index)]]))


class Inverts:
    """A transform that writes to the image that it gets."""

    def __call__(self, image: Tensor) -> Tensor:
        return image.bitwise_not_()


@pytest.mark.parametrize("one_size", [True, False])
def test_augmentations_that_write_to_an_image_change_no_other_view(tmp_path: Path, one_size: bool) -> None:
    custom = [{"kind": "custom", "factory": f"{__name__}:Inverts"}, *CROP]
    views = views_of(write(tmp_path / "in", one_size), augmentations=custom)
    loader = ViewLoader(views)
    for _ in range(2):
        for keys, found in zip(KEYS, loader.render(KEYS), strict=True):
            assert torch.equal(found, views.__getitems__(keys))


def test_a_cache_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "in", one_size=False)
    entry = {"kind": "image_folder", "root": str(root), "labelled": False}
    crop = [{"kind": "random_resized_crop", "size": 4}]
    options: dict[str, Any] = {"dataset": entry, "views": {"num_views": 3, "augmentations": crop}}
    options |= {"row_checksums": True, "batch_size": 16, "start_method": "fork"}
    run(tmp_path / "shared.zarr", num_workers=2, **options)
    monkeypatch.setenv(VARIABLE, "0")
    run(tmp_path / "plain.zarr", num_workers=2, **options)
    assert contents(tmp_path / "shared.zarr") == contents(tmp_path / "plain.zarr")


def _printed(program: Program) -> str:
    with suppress(FileNotFoundError):  # before it has begun
        return program.out
    return ""


def started(memory: Path, root: Path, num_workers: int, expected: list[int]) -> tuple[Program, int]:
    """Start a program that renders all images; return it and its process once it has."""
    program = Program("tests.views.sharing_images", str(memory.parent), str(root), str(num_workers))
    try:
        until(lambda: program.poll() is not None or _printed(program).endswith("\n"))
        process, *sums = json.loads(program.out)
        assert sums == expected, program.errors
    except BaseException:
        program.end(signal.SIGKILL)
        raise
    return program, process


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_that_end_or_are_killed_leave_nothing_behind(tmp_path: Path, memory: Path, num_workers: int) -> None:
    root, end = write(tmp_path / "in"), tmp_path / "in.end"
    views = Views(ImageFolder(root=str(root)).open(), ViewSpec())
    expected = [sum(int(views.images.read(i).sum()) for i in range(start, start + 8)) for start in range(0, COUNT, 8)]
    killed, first = started(memory, root, num_workers, expected)
    other, _ = started(memory, root, num_workers, expected)
    with killed, other:
        (file,) = memory.iterdir()
        os.kill(first, signal.SIGKILL)
        assert killed.wait(60) == -signal.SIGKILL
        time.sleep(0.3)
        assert list(memory.iterdir()) == [file]  # the other process uses it
        end.touch()
        assert other.wait(60) == 0, other.errors
        assert list(memory.iterdir()) == []
        end.unlink()
    alone, process = started(memory, root, num_workers, expected)
    with alone:
        os.kill(process, signal.SIGKILL)
        alone.wait(60)
        if num_workers == 0:  # nobody is left to remove it: the next process uses it, and does
            assert len(list(memory.iterdir())) == 1
            following, _ = started(memory, root, 0, expected)
            with following:
                end.touch()
                assert following.wait(60) == 0
        until(lambda: not list(memory.iterdir()))
