"""Predictions of a run: the logits of its evaluation, of images of any place."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import logitcache as lc
from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.evaluation.predict import evaluated_orientation
from logitcache.student.evaluation.single_label import Tally
from logitcache.student.training import train
from tests.student.small import LINEAR, student, teacher

BATCH = 8
AUGMENTATIONS = [{"kind": "resize", "size": 24}, {"kind": "center_crop", "size": 20}]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photographs of several sizes, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        pixels = torch.randint(0, 256, (30 + number, 44, 3), dtype=torch.uint8, generator=generator)
        target = folder / f"class{number % 2}" / f"{number:02}.{'png' if number % 3 else 'jpg'}"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(target)
    return folder


@pytest.fixture(scope="module")
def run(cache: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is measured on the photographs, as grey images."""
    out = tmp_path_factory.mktemp("predicted") / "run"
    dataset = {"kind": "image_folder", "root": str(photos), "mode": "L", "labelled": False}
    train(
        student(
            out,
            cache,
            epochs=1,
            validation={"dataset": dataset, "augmentations": AUGMENTATIONS, "batch_size": BATCH},
        )
    )
    return out


@pytest.fixture
def served(photos: Path) -> Iterator[str]:
    """The photographs on a web server of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def measured_logits(run: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the logits that `evaluate` counts, [N, C]."""
    seen: list[Tensor] = []
    of = Tally.of

    def spy(logits: Tensor, labels: Tensor, teachers: object) -> Tally:
        seen.append(logits.cpu())
        return of(logits, labels, teachers)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "of", spy)
        evaluate(run)
    return torch.cat(seen)


def test_predictions_are_those_of_evaluate_to_the_bit(run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = measured_logits(run, monkeypatch)
    found = lc.predict(run, [photos], top=10, batch_size=BATCH)
    assert [one.image for one in found] == [str(path) for path in sorted(photos.rglob("*.*"))]
    logits = torch.tensor([[c.logit for c in sorted(one.classes, key=lambda c: c.label)] for one in found])
    assert torch.equal(logits, wanted)
    for one, row in zip(found, wanted.softmax(dim=1), strict=True):
        assert [c.label for c in one.classes] == row.argsort(descending=True).tolist()
        assert [c.probability for c in one.classes] == row.sort(descending=True).values.tolist()
        assert one.classes[0].name == lc.load_student(run).class_names[one.classes[0].label]  # type: ignore[index]


def test_files_folders_and_urls_give_the_same(run: Path, photos: Path, served: str) -> None:
    pytest.importorskip("aiohttp", reason="URLs of web servers need the extra http")
    folder = photos / "class1"
    names = sorted(path.name for path in folder.iterdir())
    by_folder = lc.predict(run, [f"{folder}/"])
    by_file = lc.predict(run, [folder / name for name in names])
    by_url = lc.predict(run, [f"{served}/class1/{name}" for name in names])
    assert [one.image for one in by_url] == [f"{served}/class1/{name}" for name in names]
    assert [one.classes for one in by_folder] == [one.classes for one in by_file] == [one.classes for one in by_url]


def test_images_of_several_sizes_are_predicted_without_a_crop(run: Path, photos: Path, tmp_path: Path) -> None:
    record = json.loads((run / "evaluation.json").read_text())
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "evaluation.json").write_text(json.dumps(record | {"augmentations": [{"kind": "resize", "size": 20}]}))
    together = lc.predict(copied, [photos])
    assert len({one.classes for one in together}) == 20
    alone = [lc.predict(copied, [one.image])[0] for one in together]
    assert [[c.label for c in one.classes] for one in together] == [[c.label for c in one.classes] for one in alone]


def test_bad_images_are_named_and_do_not_stop_the_others(
    run: Path, photos: Path, served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiohttp", reason="URLs of web servers need the extra http")
    broken, missing, empty = tmp_path / "broken.jpg", tmp_path / "missing.png", tmp_path / "empty"
    broken.write_bytes(b"no image")
    empty.mkdir()
    good = [str(path) for path in sorted(photos.rglob("*.png"))[:3]]
    bad = [str(broken), str(missing), str(empty), f"{served}/nowhere.png", f"{served}/", f"{served}/a.png?key=secret"]
    words = [good[0], *bad[:3], good[1], *bad[3:], good[2]]
    assert main(["predict", str(run), *words, "--json"]) == 2
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["images"], document["failed"]) == (9, 6)
    read = {one["image"]: one["classes"] for one in document["predictions"] if one["error"] is None}
    assert list(read) == good
    assert [one["image"] for one in document["predictions"] if one["error"]] == bad
    for one in document["predictions"]:
        assert one["error"] is None or ("Fix: " in one["error"] and not one["classes"]), one
    for name in (broken, missing, empty, f"{served}/nowhere.png"):
        assert str(name) in document["error"]["message"]
    alone = lc.predict(run, good)
    assert [[c["label"] for c in read[one.image]] for one in alone] == [[c.label for c in one.classes] for one in alone]


def test_the_command_prints_a_line_for_each_image(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(photos), "--top", "2", "-q"]) == 0
    shown = capsys.readouterr()
    found = lc.predict(run, [photos], top=2)
    assert [line.split()[0] for line in shown.out.splitlines()] == [one.image for one in found]
    for line, one in zip(shown.out.splitlines(), found, strict=True):
        for score in one.classes:
            assert f"{score.name} {100 * score.probability:.1f} %" in line
    assert shown.err == ""


def test_the_orientation_is_that_of_the_measured_images_unless_it_is_given(run: Path, tmp_path: Path) -> None:
    turned, upright = tmp_path / "turned.jpg", tmp_path / "upright.png"
    image = Image.radial_gradient("L").crop((0, 0, 120, 200)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, exif=exif, quality=95)
    Image.open(turned).rotate(-90, expand=True).save(upright)
    ignored, (applied,), (wanted,) = (
        lc.predict(run, [turned]),
        lc.predict(run, [turned], orientation="apply"),
        lc.predict(run, [upright]),
    )
    assert applied.classes == wanted.classes
    assert ignored[0].classes != wanted.classes


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "image_folder", "root": "photos"},
        {"kind": "webdataset", "shards": "photos.tar"},
        {"kind": "huggingface", "path": "photos"},
    ],
    ids=lambda entry: entry["kind"],
)
def test_every_kind_of_data_set_that_turns_images_is_asked(entry: dict[str, str], tmp_path: Path) -> None:
    recipes = [
        student(tmp_path, tmp_path, validation={"dataset": entry | how}) for how in ({}, {"orientation": "apply"})
    ]
    assert [evaluated_orientation(recipe, None) for recipe in recipes] == ["ignore", "apply"]


def test_a_run_whose_evaluation_applies_orientations_predicts_so(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.linear_gradient("L").resize((30, 30)).save(folder / "a.jpg", exif=exif)
    dataset = {"kind": "image_folder", "root": str(folder), "mode": "L", "orientation": "apply"}
    train(student(tmp_path / "run", cache, epochs=1, validation={"dataset": dataset, "augmentations": AUGMENTATIONS}))
    default, applied, ignored = (
        lc.predict(tmp_path / "run", [folder], orientation=orientation) for orientation in (None, "apply", "ignore")
    )
    assert default == applied != ignored


@pytest.mark.filterwarnings("ignore:2 of 2 images")
def test_a_run_that_was_not_measured_predicts_on_images_turned_as_those_that_it_learned_from(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "photos" / name / "1.jpg", exif=exif)
    dataset = {"kind": "image_folder", "root": str(tmp_path / "photos"), "mode": "L"}
    for how, other in (("apply", "ignore"), ("ignore", "apply")):
        train(teacher(tmp_path / how, dataset=dataset | {"orientation": how}, epochs=1, batch_size=2))
        default, same, otherwise = (
            lc.predict(tmp_path / how, [tmp_path / "photos"], orientation=given) for given in (None, how, other)
        )
        assert default == same != otherwise


def test_classes_of_images_of_several_have_probabilities_of_their_own(
    cache: Path, photos: Path, tmp_path: Path
) -> None:
    train(student(tmp_path / "run", cache, epochs=1, losses=[{"kind": "multi_label_kl"}]))
    (found,) = lc.predict(tmp_path / "run", [next(photos.rglob("*.jpg"))], top=10)
    logits = torch.tensor([c.logit for c in found.classes])
    assert [c.probability for c in found.classes] == logits.sigmoid().tolist()


def test_factories_that_a_file_names_are_not_called(cache: Path, photos: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, model=LINEAR, epochs=1))
    with pytest.raises(RecipeError, match="never called"):
        lc.predict(tmp_path / "run", [photos])
    found = lc.predict(tmp_path / "run", [photos], [f"model.factory={LINEAR['factory']}"])
    assert all(one.error is None for one in found)


def test_a_batch_beyond_the_memory_is_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    stored = json.loads((copied / "model.json").read_text())
    stored["preprocessing"]["input_size"] = 2048
    (copied / "model.json").write_text(json.dumps(stored))
    with pytest.raises(RecipeError, match="--batch-size"):
        lc.predict(copied, [photos], batch_size=100_000)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), "a.png"]) == 2
    assert f"{tmp_path} is no run" in capsys.readouterr().err
