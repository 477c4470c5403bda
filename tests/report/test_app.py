"""Models side by side on an image: students as `predict` has them, teachers as the cache has them."""

import json
import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.report.app.server import _listen
from logitcache.report.app.side_by_side import Shown, SideBySide
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.keys import ViewKey
from tests.student.small import IMAGES, fill, network, recipe, student, teacher

OTHER = {"kind": "small_cnn", "width": 6}
FIRST = [{"kind": "kl_divergence", "teacher": "net"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teachers nothing can rebuild, two students of it, and images that it has and has not."""
    folder = tmp_path_factory.mktemp("app")
    fill(folder / "c.zarr", {"net": network(1), "other": network(2)})
    train(student(folder / "a", folder / "c.zarr", losses=FIRST, epochs=1))
    train(student(folder / "b", folder / "c.zarr", losses=FIRST, epochs=1, model=OTHER))
    pixels = open_dataset(Bundled(num_images=200)).read(17)[0].numpy()
    Image.fromarray(pixels).save(folder / "known.png")
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(folder / "new.jpg")
    return folder


@pytest.fixture(scope="module")
def models(world: Path) -> SideBySide:
    return SideBySide([world / "a", world / "b"], str(world / "c.zarr"))


def predicted(run: Path, image: Path) -> dict[str, float]:
    (found,) = lc.predict(run, [image])
    return {str(c.name): c.probability for c in found.classes}


def test_students_answer_as_predict_does(world: Path, models: SideBySide) -> None:
    assert models.models == (str(world / "a"), str(world / "b"), "teacher net", "teacher other")
    shown = models.show_file(world / "new.jpg")
    assert shown.scores == {str(world / run): predicted(world / run, world / "new.jpg") for run in ("a", "b")}
    assert (shown.views, shown.pixels is None) == ((), False)
    assert "whose teachers did not answer it" in shown.note


def test_an_image_of_the_cache_is_recognised_and_has_its_cached_answers(world: Path, models: SideBySide) -> None:
    shown = models.show_file(world / "known.png")
    cache = open_cache(world / "c.zarr")
    keys, names = [ViewKey(0, 17), ViewKey(1, 17)], cache.manifest.class_names
    assert names is not None
    for teacher_name, targets in cache.answers(keys).items():
        mean = targets.logits.softmax(1).mean(0)
        found = shown.scores[f"teacher {teacher_name}"]
        assert list(found) == [names[c] for c in mean.argsort(descending=True)[:5]]
        assert list(found.values()) == pytest.approx(mean.sort(descending=True).values[:5].tolist(), rel=1e-5)
    assert shown.scores[str(world / "a")] == predicted(world / "a", world / "known.png")
    assert len(shown.views) == 2
    assert f"Image 17 (train/36356) of {world / 'c.zarr'}, label: {names[int(cache.labels[17])]}." in shown.note
    for text in ("17", " train/36356 "):
        assert repr(models.show_named(text)) == repr(shown)


@pytest.mark.parametrize("text", ["200", "", "train/36357", "../c.zarr"])
def test_an_image_that_the_cache_does_not_have_is_named(models: SideBySide, text: str) -> None:
    shown = models.show_named(text)
    assert (shown.pixels, shown.scores, shown.views) == (None, {}, ())
    assert f"no image {text.strip()!r}" in shown.note
    assert "Fix: an index from 0 to 199" in shown.note


def test_files_of_a_folder_are_recognised_by_their_bytes(tmp_path: Path, world: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        file = tmp_path / "photos" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 28 + number, 3), dtype=np.uint8)).save(file)
    crop = {"augmentations": [{"kind": "center_crop", "size": 28}]}
    images = {"kind": "image_folder", "root": str(tmp_path / "photos"), "mode": "L", "labelled": False}
    cache = fill(tmp_path / "c.zarr", {"net": network()}, images=images, views=crop)
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    found = SideBySide([world / "a"], str(cache), [f"dataset.root={tmp_path / 'moved'}"])
    shutil.copy(tmp_path / "moved/2.png", tmp_path / "of another name.png")
    shown = found.show_file(tmp_path / "of another name.png")
    assert shown.note.startswith("Image 2 (2.png)")
    assert "label: none" in shown.note
    assert shown.scores[str(world / "a")] == predicted(world / "a", tmp_path / "moved/2.png")


def png(width: int, height: int) -> bytes:
    """Write a PNG that says how large it is, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


HOSTILE = {
    "empty.png": b"",
    "text.jpg": b"no image",
    "page.png": b"<svg onload=alert(1)>",
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "bomb.png": png(100_000, 100_000),
    "cut.png": png(40, 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_image_is_an_answer_and_no_error(models: SideBySide, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    shown = models.show_file(tmp_path / name)
    assert (shown.pixels, shown.scores, shown.views) == (None, {}, ())
    assert f"image '{name}' cannot be read" in shown.note
    assert "Fix: " in shown.note
    assert str(tmp_path) not in shown.note


def test_links_are_not_followed(models: SideBySide, world: Path, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(world / "known.png")
    assert models.show_file(tmp_path / "link.png") == Shown(
        "it is a symbolic link, and none is followed here: copy the files themselves (cp -rL)"
    )


def test_teachers_are_loaded_for_other_images_if_that_is_asked_for(tmp_path: Path, world: Path) -> None:
    train(teacher(tmp_path / "teacher"))
    shutil.copy(world / "new.jpg", tmp_path)
    source = {"model": {"kind": "run", "path": str(tmp_path / "teacher")}}
    entries = {"cache": str(tmp_path / "c.zarr"), "dataset": IMAGES, "teachers": {"t": source}}
    precompute(recipe(PrecomputeRecipe, num_workers=0, device="cpu", **entries))
    found = SideBySide([world / "a"], entries["cache"], online=True)
    shown = found.show_file(tmp_path / "new.jpg")
    wanted = predicted(tmp_path / "teacher", tmp_path / "new.jpg")
    assert shown.scores["teacher t"] == pytest.approx(wanted, rel=1e-5)
    assert "whose teachers answer now" in shown.note


def test_classes_of_one_name_stay_apart(models: SideBySide) -> None:
    assert models._best([("cat", 0.2), ("dog", 0.5), ("cat", 0.3)]) == {"dog": 0.5, "cat": 0.3, "cat (2)": 0.2}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["app", *words, "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["exit_code"] == 2
    return shown.err


def test_options_without_a_cache_and_what_is_no_run_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(world / "a")
    assert "--online has no effect without a cache. Fix: --cache" in refused([run, "--online"], capsys)
    assert "--set dataset has no effect without a cache" in refused([run, "--set", "dataset.root=x"], capsys)
    assert "is no run" in refused([run, str(tmp_path)], capsys)
    assert "has no recipe for 'device=cpu'" in refused(["a.onnx", "--set", "device=cpu"], capsys)
    assert "has no recipe" not in refused([run, str(tmp_path / "a.onnx"), "--set", "device=cpu"], capsys)
    assert main(["app", run, "--cache", str(tmp_path)]) == 3


def test_without_gradio_the_extra_is_named(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'logitcache[app]'" in refused([str(world / "a")], capsys)


def test_a_port_that_is_taken_is_named(world: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            RecipeError, match=rf"cannot listen on 127.0.0.1, port {port}: .*in use.* Fix: another --port"
        ):
            _listen("127.0.0.1", port)
    with pytest.raises(RecipeError, match=r"cannot listen on 192\.0\.2\.1, ports 7860 to 7959: "):
        _listen("192.0.2.1", None)
    with _listen("127.0.0.1", None) as first, _listen("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1]
