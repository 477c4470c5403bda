"""`recipe new`: recipes for a folder of one's own, which check, plan and the commands of both stages accept."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import logitcache as lc
from logitcache.cli.app import main
from logitcache.models import Torchvision
from logitcache.report.new_recipes import texts
from logitcache.report.new_recipes.new_recipes import NewRecipes, new_recipes
from logitcache.report.new_recipes.sources import Source, inspect_folder, read_source
from tests.models.hub import keep_timm_weights, keep_torchvision_weights
from tests.models.nets import TINY_TIMM, saved_run

STUDENT = "test_efficientnet.r160_in1k"
BIG = "timm:vit_base_patch16_384.augreg_in1k"


def draw(root: Path, folders: tuple[str, ...], count: int, size: int = 40) -> None:
    """Write photographs, one after another into each of the folders."""
    generator = np.random.default_rng(0)
    for number in range(count):
        file = root / folders[number % len(folders)] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size + number, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entries(made: NewRecipes) -> list[dict[str, Any]]:
    return [yaml.safe_load(Path(file).read_text()) for file in made.files]


def run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def test_photographs_become_a_student_that_begins_with_pretrained_weights(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(here / "my photos", ("a", "b", "c"), 20)
    (here / "my photos/a/notes.txt").write_text("no image")
    keep_timm_weights(here / "hub", TINY_TIMM, monkeypatch)
    pretrained = keep_timm_weights(here / "hub", STUDENT, monkeypatch)
    run("recipe", "new", "--images", "my photos", "--teacher", f"timm:{TINY_TIMM}", "--student", f"timm:{STUDENT}")
    precompute, validation, student, fine_tuning = capsys.readouterr().out.splitlines()
    assert precompute == "pipelines/my_photos/precompute.yaml"
    run("recipe", "check", precompute, validation, student, fine_tuning)
    capsys.readouterr()
    run("plan", precompute, "--no-probe", "--json", "--set", "num_workers=0")
    planned = json.loads(capsys.readouterr().out)
    for made in (precompute, validation):
        assert main(["train-student", student]) == 3
        assert f"does not exist. Fix: logitcache precompute {made}\n" in capsys.readouterr().err
        run("precompute", made, "--set", "num_workers=0")
    cache = lc.open_cache("caches/my_photos.zarr")
    assert (len(cache), cache.num_views) == (18, 8)
    assert planned["images"] == 18
    assert len(lc.open_cache("caches/my_photos-validation.zarr")) == 2
    # No step moves the weights: the run ends with those that it began with.
    still = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "epochs=1", "num_workers=0", "schedule.warmup_epochs=0"]
    run("train-student", student, *(word for change in still for word in ("--set", change)))
    found = load_file("runs/my_photos/weights.safetensors")
    for name, value in pretrained.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    capsys.readouterr()
    run("evaluate", "runs/my_photos", "--json")
    assert 0 <= json.loads(capsys.readouterr().out)["measures"]["agreement"] <= 1
    used = lc.load_student("runs/my_photos")
    pixels = used.preprocess(Image.open("my photos/a/00.png"))
    assert pixels.shape == (3, 160, 160)
    assert used(pixels[None]).shape == (1, 1000)


def test_a_teacher_is_trained_on_classes_that_it_does_not_predict(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    keep_timm_weights(here / "hub", TINY_TIMM, monkeypatch)
    made = new_recipes("photos", f"timm:{TINY_TIMM}", BIG, here / "first")
    recipe = Path(made.files[-1])
    assert recipe.name == "teacher.yaml"
    run("train-teacher", str(recipe), *(f"--set={word}" for word in ("epochs=1", "num_workers=0", "device=cpu")))
    assert "--teacher run:runs/first-teacher --student" in capsys.readouterr().err
    (line,) = [line for line in recipe.read_text().splitlines() if "logitcache recipe new" in line]
    run(*shlex.split(line.removeprefix("#   logitcache ")))
    assert "began with random weights" not in capsys.readouterr().err
    recorded = here / "runs/first-teacher/recipe.yaml"
    changed = yaml.safe_load(recorded.read_text())
    changed["model"] |= {"pretrained": False, "new_head": False}
    recorded.write_text(yaml.safe_dump(changed))
    run(
        "recipe", "new", "--images", "photos", "--teacher", "run:runs/first-teacher", "--student", BIG, "--out", "third"
    )
    assert "first-teacher began with random weights; vit_base_patch16_384" in capsys.readouterr().err
    second = yaml.safe_load(Path(f"{here}/first-classes/precompute.yaml").read_text())
    assert second["dataset"]["labelled"] is True
    assert not Path(f"{here}/first-classes/teacher.yaml").exists()


def test_a_student_of_few_layers_begins_at_the_teachers_size(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    with pytest.raises(lc.RecipeError, match=r"--student 'large_cnn' names no model.*or small_cnn"):
        new_recipes("photos", "torchvision:squeezenet1_1", "large_cnn")
    made = new_recipes("photos", "torchvision:squeezenet1_1", "small_cnn")
    student = yaml.safe_load(Path(made.files[2]).read_text())
    assert student["model"] == {"kind": "small_cnn"}
    assert student["preprocessing"]["input_size"] == 224
    assert "the images have up to 58 pixels a side, and the recipes bring them to 224" in caplog.text
    run("recipe", "check", *made.files)


def test_folders_numbered_as_in_wordnet_are_imagenets_classes(here: Path) -> None:
    names = Torchvision(name="resnet18", weights="DEFAULT").class_names()
    facts = Torchvision(name="resnet18", weights="DEFAULT").pretrained_facts()
    folders = tuple(f"n{number:08}" for number in range(1000))
    draw(here / "photos", folders, 1000, size=1)
    taught = Source({"kind": "run", "path": "runs/student"}, "student", facts, (224, 224), names)
    found = inspect_folder("photos", taught)
    assert (found.class_names, found.has_other_classes) == (folders, False)
    assert names is not None
    found = inspect_folder("photos", replace(taught, class_names=names[::-1]))
    assert (found.class_names, found.has_other_classes) == (None, True)


def test_all_logits_are_kept_where_the_most_probable_ones_would_take_more(here: Path) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    source = read_source("--teacher", "torchvision:squeezenet1_1")
    folder = replace(inspect_folder("photos", source), num_images=10**8)
    kinds = {}
    for classes in (2, 206, 207, 1000):
        taught = replace(source, facts=source.facts._replace(num_classes=classes))
        text = texts.precompute_text(folder, taught, "photos", Path("my recipes"), "")
        assert "logitcache precompute 'my recipes/precompute.yaml'" in text
        kinds[classes] = yaml.safe_load(text)["teachers"]["squeezenet1_1"]["logits"]["kind"]
    assert kinds == {2: "dense", 206: "dense", 207: "top_k", 1000: "top_k"}


def test_folders_of_the_teachers_classes_are_labels(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    lc.train(
        lc.load_recipe(
            {
                "out": "runs/teacher",
                "dataset": {"kind": "image_folder", "root": "photos"},
                "augmentations": [{"kind": "center_crop", "size": 32}],
                "model": {"kind": "small_cnn", "width": 4},
                "epochs": 1,
                "num_workers": 0,
            },
            lc.TeacherRecipe,
        )
    )
    keep_torchvision_weights(here / "torch", "squeezenet1_1", monkeypatch)
    made = new_recipes("photos", "run:runs/teacher", "torchvision:squeezenet1_1")
    stage_one, student = entries(made)
    assert (made.labelled, made.num_images) == (True, 18)
    assert stage_one["dataset"]["labelled"] is True
    assert stage_one["views"]["augmentations"][0] == {"kind": "random_resized_crop", "size": 32, "scale": [0.25, 1.0]}
    assert stage_one["teachers"] == {
        "teacher": {
            "model": {"kind": "run", "path": "runs/teacher"},
            "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
            "speed": {"channels_last": True, "fold": True},
            "logits": {"kind": "dense"},
        }
    }
    assert student["model"] == {"kind": "torchvision", "name": "squeezenet1_1", "weights": "DEFAULT", "new_head": True}
    assert student["validation"]["augmentations"][1] == {"kind": "center_crop", "size": 224}
    for recipe in made.files:
        run("recipe", "check", recipe)
    run("precompute", made.files[0], "--set", "num_workers=0", "--set", "views.num_views=2")
    changes = ["--set", "epochs=1", "--set", "schedule.warmup_epochs=0", "--set", "num_workers=0"]
    run("train-student", made.files[1], *changes)
    assert lc.load_student("runs/photos").class_names == ("cat", "dog")


def test_other_classes_and_their_number_are_not_labels(here: Path) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    saved_run(here / "runs/two", lc_model(), 2, 3)
    saved_run(here / "runs/three", lc_model(), 3, 3)
    sizes = [{"kind": "center_crop", "size": 32}]
    for name, classes in (("two", ["dog", "fox"]), ("three", None)):
        record = {"augmentations": sizes, "class_names": classes, "epoch": 1}
        (here / f"runs/{name}/evaluation.json").write_text(json.dumps(record))
    for name, why in (("two", "other classes"), ("three", "the folders are 2 classes, three predicts 3")):
        made = new_recipes("photos", f"run:runs/{name}", "timm:resnet18.a1_in1k", here / name)
        assert not made.labelled
        text = Path(made.files[0]).read_text()
        assert "labelled: false  # not read: " in text
        assert why in text


@pytest.mark.parametrize("augmentations", [None, [], [{"kind": "resize", "size": 32}]])
def test_a_run_that_records_no_size_of_images_is_refused(here: Path, augmentations: list[Any] | None) -> None:
    draw(here / "photos", ("cat", "dog"), 20)
    saved_run(here / "runs/two", lc_model(), 2, 3)
    if augmentations is not None:
        (here / "runs/two/evaluation.json").write_text(json.dumps({"augmentations": augmentations, "epoch": 1}))
    with pytest.raises(lc.LogitCacheError, match="takes images of any size, and does not record one"):
        new_recipes("photos", "run:runs/two", BIG)


def lc_model() -> Any:
    from logitcache.models import SmallCNN

    return SmallCNN(width=4)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test")])
def test_folders_of_training_and_validation_images_are_taken_as_these(here: Path, names: tuple[str, str]) -> None:
    draw(here / "photos" / names[0], ("a", "b"), 6)
    draw(here / "photos" / names[1], ("a", "b"), 3)
    made = new_recipes("photos", "timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k")
    stage_one, validation, *_ = entries(made)
    assert made.num_images == 6
    assert [one["dataset"]["root"] for one in (stage_one, validation)] == [f"photos/{name}" for name in names]
    assert "split" not in stage_one["dataset"]


def test_images_beside_class_folders_are_read_without_labels(here: Path) -> None:
    draw(here / "photos", (".", "a"), 12)
    made = new_recipes("photos", "timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k")
    assert made.num_images == 10
    assert "images of no class" in Path(made.files[0]).read_text()


def test_variants_of_the_teacher_are_timed_where_many_rows_pay_for_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(here / "photos", ("a",), 12)
    monkeypatch.setattr(texts, "LEAST_TIMED", 8 * 10)
    stage_one, validation, *_ = entries(new_recipes("photos", BIG, "torchvision:mobilenet_v3_small"))
    (teacher,), (measured,) = stage_one["teachers"].values(), validation["teachers"].values()
    assert teacher["speed"] == "auto"
    assert "speed" not in measured


@pytest.mark.parametrize(
    ("device", "batch_size", "speed"), [("cpu", 16, {"channels_last": True, "fold": True}), ("cuda", 64, None)]
)
def test_batches_and_the_variant_of_a_small_cache_are_those_of_the_device(
    here: Path, monkeypatch: pytest.MonkeyPatch, device: str, batch_size: int, speed: dict[str, bool] | None
) -> None:
    draw(here / "photos", ("a",), 12)
    monkeypatch.setattr(texts, "resolve_device", lambda name: torch.device(device))
    made = new_recipes("photos", "torchvision:resnet50", "torchvision:mobilenet_v3_small")
    stage_one, validation, student = entries(made)
    assert (stage_one["batch_size"], validation["batch_size"], student["batch_size"]) == (batch_size, batch_size, 64)
    assert stage_one["teachers"]["resnet50"].get("speed") == speed
    run("recipe", "check", *made.files)


@pytest.mark.parametrize(("side", "decode"), [(1791, None), (1792, "scaled")])
def test_large_photographs_are_decoded_at_a_part_of_their_size(here: Path, side: int, decode: str | None) -> None:
    draw(here / "photos", ("a",), 12)
    Image.new("RGB", (8, side)).save(here / "photos/a/05.png")
    made = new_recipes("photos", "torchvision:resnet50", "torchvision:mobilenet_v3_small")
    stage_one, validation, _ = entries(made)
    assert stage_one["views"].get("decode") == validation["views"].get("decode") == decode
    run("recipe", "check", *made.files)


def test_sizes_and_normalisation_are_those_of_the_weights(here: Path) -> None:
    draw(here / "photos", ("a",), 12)
    made = new_recipes("photos", BIG, "torchvision:mobilenet_v3_small")
    stage_one, validation, student, *_ = entries(made)
    (teacher,) = stage_one["teachers"].values()
    assert teacher["preprocessing"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 384}
    assert stage_one["views"]["augmentations"][0]["size"] == 384
    assert validation["views"]["augmentations"] == [
        {"kind": "resize", "size": 384},
        {"kind": "center_crop", "size": 384},
    ]
    assert student["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert student["preprocessing"]["input_size"] == 224


def test_logits_that_would_be_large_are_kept_as_the_most_probable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(here / "photos", ("a",), 12)
    monkeypatch.setattr(texts, "MOST_BYTES", 2 * 1000 * 8 * 10 - 1)
    text = Path(new_recipes("photos", BIG, BIG).files[0]).read_text()
    assert yaml.safe_load(text)["teachers"]["vit_base_patch16_384_augreg_in1k"]["logits"] == {"kind": "top_k", "k": 100}
    assert "all are 160 kB" in text


@pytest.mark.parametrize("name", ["photos", "Фото 1", "a, b: {c} #d", "it's"])
def test_any_name_of_a_folder_is_quoted(here: Path, name: str) -> None:
    draw(here / name, ("a",), 12)
    made = new_recipes(name, BIG, BIG)
    assert entries(made)[0]["dataset"]["root"] == name
    run("recipe", "check", *made.files)


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(here / "photos", ("a",), 12)
    kept = here / "mine/student.yaml"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert main(["recipe", "new", "--images", "photos", "--teacher", BIG, "--student", BIG, "--out", "mine"]) == 2
    assert "mine/student.yaml exists and is not overwritten" in capsys.readouterr().err
    assert [file.read_text() for file in kept.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnet50", "--teacher 'resnet50' names no model. Fix: timm:NAME"),
        ("timm:", "names no model"),
        ("timm:resnet50.a1_in1", "did you mean resnet50.a1_in1k"),
        ("timm:resnet10t", ""),
        ("timm:vit_base_patch16_siglip_224.webli", "has no pretrained classifier"),
        ("torchvision:resnet51", "did you mean resnet50"),
        ("run:nowhere", "is not a run"),
    ],
)
def test_a_model_that_is_not_there_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], teacher: str, message: str
) -> None:
    draw(here / "photos", ("a",), 12)
    code = main(["recipe", "new", "--images", "photos", "--teacher", teacher, "--student", BIG])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_a_folder_without_images_is_an_error(here: Path) -> None:
    with pytest.raises(lc.DataError, match="does not exist"):
        new_recipes("photos", BIG, BIG)
    draw(here / "photos", ("a",), 1)
    with pytest.raises(lc.DataError, match="1 image, which is that of split: validation"):
        new_recipes("photos", BIG, BIG)
