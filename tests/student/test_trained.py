"""Using a finished run: its pixels, classes and weights come with it."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.errors import DataError, RecipeError
from logitcache.models import Torchvision
from logitcache.report.answers import class_names
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from tests.fixes import called, fix_of
from tests.student.small import LINEAR, TEST_IMAGES, UNLABELLED, linear, metrics, recipe, student, teacher

SMALLER = [{"kind": "resize", "size": 24}, {"kind": "center_crop", "size": 20}]


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(student(out, cache, epochs=1, validation={"dataset": TEST_IMAGES, "augmentations": SMALLER}))
    return out


def _pil(index: int) -> Image.Image:
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    return Image.fromarray(images.read(index)[0].numpy())


def test_a_loaded_student_measures_as_evaluate_does(run: Path) -> None:
    model = lc.load_student(run)
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    pixels = torch.stack([model.preprocess(_pil(index)) for index in range(100)])
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (100, 1, 20, 20))
    with torch.no_grad():
        best = model(pixels).argmax(dim=1)
    assert float((best.numpy() == images.labels).mean()) == evaluate(run).measures.top1
    assert model.class_names == images.class_names
    assert (model.training, model.epoch) == (False, 1)


def test_images_of_any_kind_are_taken_and_others_refused(run: Path) -> None:
    preprocess = pickle.loads(pickle.dumps(lc.load_student(run).preprocess))
    image = _pil(3)
    wanted = preprocess(image)
    array = np.asarray(image)
    for same in (array, torch.from_numpy(array.copy())[None], image.convert("RGB")):
        assert torch.equal(preprocess(same), wanted)
    assert preprocess(Image.new("RGB", (300, 200))).shape == (1, 20, 20)
    for other in ("a.png", array / 255, None):
        with pytest.raises(DataError, match="the image cannot be read"):
            preprocess(other)


def test_without_augmentations_images_are_cropped_to_the_size_that_was_measured(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1))
    model = lc.load_student(tmp_path / "run")
    assert model.preprocess(Image.new("RGB", (90, 60))).shape == (1, 28, 28)
    assert torch.equal(model.preprocess(_pil(0)), torch.from_numpy(np.asarray(_pil(0)).copy())[None])


def test_other_images_are_evaluated_as_the_run_recorded(run: Path) -> None:
    images = "validation={dataset: {kind: bundled, split: test, num_images: 100}%s}"
    assert evaluate(run, [images % ""]).measures == evaluate(run).measures
    larger = evaluate(run, [images % ", augmentations: [{kind: resize, size: 40}]"]).measures
    assert larger != evaluate(run).measures


def test_a_run_of_an_earlier_release_loads_and_says_what_it_lacks(run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / "old")
    (old / "evaluation.json").unlink()
    model = lc.load_student(old)
    assert (model.class_names, model.epoch) == (None, None)
    assert evaluate(old).epoch is None
    with pytest.raises(RecipeError, match="did not record") as refused:
        _ = model.preprocess
    fixed = called(fix_of(refused.value).replace("224", "28"), load_student=lc.load_student, run=old)
    assert fixed.preprocess(_pil(0)).shape == (1, 28, 28)


@pytest.mark.parametrize("content", ["", "[]", '{"augmentations": [{"kind": "custom"}], "epoch": 1}', '{"epoch": "1"}'])
def test_a_damaged_record_is_refused(content: str, run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "evaluation.json").write_text(content)
    for use in (lc.load_student, evaluate):
        with pytest.raises(RecipeError, match=r"evaluation\.json cannot be read"):
            use(damaged)


def test_a_factory_that_a_file_names_is_not_called(run: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(run, tmp_path / "foreign")
    entry = {"augmentations": [{"kind": "custom", "factory": "os:abort"}], "epoch": 1}
    (foreign / "evaluation.json").write_text(json.dumps(entry))
    with pytest.raises(RecipeError, match=r'never called(.|\n)*factories=\["os:abort"\]'):
        lc.load_student(foreign)
    with pytest.raises(RecipeError, match="never called"):
        evaluate(foreign, ["validation={dataset: {kind: bundled, split: test, num_images: 50}}"])


def test_a_model_of_code_needs_its_factory(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, model=LINEAR, epochs=1))
    with pytest.raises(RecipeError, match="never called"):
        lc.load_student(tmp_path / "run")
    model = lc.load_student(tmp_path / "run", factory=LINEAR["factory"])
    assert model(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 10)


def test_a_run_of_a_module_loads_into_a_module_as_its_error_advises(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, model=None, epochs=1), model=linear())
    with pytest.raises(RecipeError, match="was passed to train, and names no model") as refused:
        lc.load_student(tmp_path / "run")
    with torch.random.fork_rng():
        fixed = called(fix_of(refused.value), load_student=lc.load_student, run=tmp_path / "run", module=linear())
    beside = lc.load_student(tmp_path / "run", factory=LINEAR["factory"])  # the other way that the error names
    pixels = torch.stack([open_dataset(Bundled.model_validate(TEST_IMAGES)).read(index) for index in range(9)])
    assert fixed(pixels).std() > 0
    assert torch.equal(fixed(pixels), beside(pixels))


def test_the_best_epoch_is_kept_where_the_recipe_says_so(tmp_path: Path) -> None:
    changes = {"validation": {"dataset": TEST_IMAGES}, "optimizer": {"kind": "sgd", "lr": 5.0}, "epochs": 4}
    for seed in range(32):  # at so high a rate the last epoch is seldom the best, of which seeds depends on the machine
        last, best = tmp_path / f"last{seed}", tmp_path / f"best{seed}"
        train(teacher(last, seed=seed, **changes))
        top1 = [row["val_top1"] for row in metrics(last)]
        if max(top1) > top1[-1]:
            break
    assert max(top1) > top1[-1], "the last epoch is always the best: this test shows nothing"
    result = train(teacher(best, seed=seed, keep="best", **changes))
    assert metrics(best) == metrics(last)
    epoch = top1.index(max(top1))
    assert (result.top1, result.best_top1) == (max(top1), max(top1))
    measured = evaluate(best)
    assert (measured.epoch, measured.measures.top1) == (epoch + 1, max(top1))
    assert evaluate(last).epoch == 4
    assert lc.load_student(best).epoch == epoch + 1
    assert not (best / "best.safetensors").exists()


def test_best_needs_something_to_measure(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add validation"):
        student(tmp_path / "run", cache, keep="best")
    unlabelled = student(tmp_path / "run", cache, keep="best", epochs=1, validation={"dataset": UNLABELLED})
    with pytest.raises(RecipeError, match="labelled images"):
        train(unlabelled)


def test_the_example_of_the_docs_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "use-a-trained-student.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "student")
    _pil(0).save("shoe.png")
    exec(code, {})
    assert capsys.readouterr().out.strip() in open_dataset(Bundled.model_validate(TEST_IMAGES)).class_names


def test_a_batch_that_would_not_fit_in_memory_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = shutil.copytree(run, tmp_path / "large")
    stored = json.loads((large / "model.json").read_text())
    stored["preprocessing"]["input_size"] = 40
    (large / "model.json").write_text(json.dumps(stored))
    values, sysconf = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 25 * 16 * 4 * 40 * 40}, os.sysconf  # for 25 images
    monkeypatch.setattr(os, "sysconf", lambda name: values.get(name) or sysconf(name))
    with pytest.raises(RecipeError, match="100 of them take") as refused:
        evaluate(large)
    fix = re.findall(r"--set (\S+?),", str(refused.value))
    assert fix == ["validation.batch_size=25"]
    assert evaluate(large, fix).images == 100


def test_the_command_says_what_a_run_did_not_record(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == 1
    old = shutil.copytree(run, tmp_path / "old")
    (old / "evaluation.json").unlink()
    assert main(["evaluate", str(old)]) == 0
    assert re.search(r"epoch\s+not recorded", capsys.readouterr().out)


def test_a_student_of_unlabelled_images_has_the_names_of_its_teachers_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Torchvision(name="squeezenet1_1", weights="DEFAULT")
    state = model.architecture().build(1000, 3).module.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    images = {"kind": "image_folder", "root": str(tmp_path / "photos"), "labelled": False}
    entries = {
        "cache": str(tmp_path / "cache"),
        "dataset": images,
        "teachers": {"net": {"model": model.model_dump(mode="json")}},
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(recipe(PrecomputeRecipe, **entries))
    train(student(tmp_path / "run", tmp_path / "cache", epochs=1, batch_size=8, validation={"dataset": images}))
    assert lc.load_student(tmp_path / "run").class_names == model.class_names()
    assert class_names(open_cache(tmp_path / "cache")) == model.class_names()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "photos" / "0.png"), "--top", "1"]) == 0
    text = capsys.readouterr().out
    assert any(f" {name} " in text for name in model.class_names() or ()), text
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "per_class" not in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["per_class"]) == 1000
