"""Exported files: they answer as the run does, hold what predicting takes, and say why a model cannot be exported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import logitcache as lc
from logitcache.cli.app import main
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import load_model
from logitcache.shipping.graph import PixelsToLogits
from logitcache.shipping.parity import Parity
from logitcache.student.training import train
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.bundled import Bundled
from tests.student.small import TEST_IMAGES, student

pytest.importorskip("onnxscript", reason="exports need the extra export")
onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]


def pixels(count: int = 100) -> Tensor:
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    return torch.stack([images.read(index) for index in range(count)])


def expected(run: Path, images: Tensor) -> np.ndarray[Any, Any]:
    """Answer by the run's network, normalised by hand."""
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = load_model(run).module.eval()((images / 255 - 0.5) / 0.5).numpy()
    return logits


def answers(file: Path, images: Any) -> np.ndarray[Any, Any]:
    """Answer by onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": images})
    return np.asarray(logits)


def test_the_file_answers_as_the_run_for_any_batch(run: Path, file: Path) -> None:
    images = pixels()
    for count in (1, 3, 100):
        found = answers(file, images[:count].numpy())
        assert np.abs(found - expected(run, images[:count])).max() < 1e-5
    assert found.shape == (100, 10)


def test_the_record_has_what_another_way_measures(run: Path, file: Path) -> None:
    record_ = json.loads(file.with_name("model.onnx.json").read_text())
    parity, images = record_["measured"]["parity"], pixels()
    own, other = expected(run, images), answers(file, images.numpy())
    labels = open_dataset(Bundled.model_validate(TEST_IMAGES)).labels
    assert parity["images"] == 100
    assert parity["agreement"] == (own.argmax(axis=1) == other.argmax(axis=1)).mean()
    assert parity["eager"] == pytest.approx((own.argmax(axis=1) == labels).mean())
    assert parity["exported"] == pytest.approx((other.argmax(axis=1) == labels).mean())
    assert parity["largest_difference"] < 1e-5
    assert record_["measured"]["bytes"] == file.stat().st_size


def test_the_file_holds_all_that_predicting_takes_and_nothing_of_this_machine(run: Path, file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    (entry,) = [entry.value for entry in model.metadata_props if entry.key == "logitcache"]
    metadata = json.loads(entry)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert metadata["evaluation"] == evaluation
    assert metadata["evaluation"]["class_names"][0] == "T-shirt/top"
    assert metadata["run"]["learns_from"] == json.loads((run / "environment.json").read_text())["learns_from"]
    assert metadata["run"]["model"] == json.loads((run / "model.json").read_text())["model"]
    assert metadata["shape"] == [1, 28, 28]
    assert str(ROOT).encode() not in file.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()


def test_floats_are_those_of_0_to_1(run: Path, tmp_path: Path) -> None:
    result = lc.export(run, tmp_path / "float.onnx", pixels="float")
    images = pixels(10)
    found = answers(Path(result.file), (images / 255).numpy())
    assert np.abs(found - expected(run, images)).max() < 1e-5


def test_pt2_answers_as_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt2"
    options = ["--format", "pt2", "--latency", "--repeats", "2", "--batch-size", "3"]
    assert main(["export", str(run), str(file), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    extra = {"logitcache.json": ""}
    program = torch.export.load(file, extra_files=extra)
    with torch.no_grad():
        found = program.module()(pixels(7)).numpy()
    assert np.abs(found - expected(run, pixels(7))).max() < 1e-5
    assert json.loads(extra["logitcache.json"])["num_classes"] == 10
    (latency,) = document["latencies"]
    assert (latency["batch_size"], latency["threads"]) == (3, torch.get_num_threads())
    assert latency["speed_up"] == pytest.approx(latency["reference_seconds"] / latency["file_seconds"])


def test_nothing_is_overwritten_unasked(run: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert main(["export", str(run), str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    for option, suffix in (("onnx", ".onnx"), ("pt2", ".pt2")):
        assert main(["export", str(run), str(file.parent / "model.bin"), "--format", option]) == 2
        assert f"Fix: {file.parent}/model.bin{suffix}" in capsys.readouterr().err
    assert main(["export", str(run), str(file.parent)]) == 2


@pytest.mark.parametrize("many", [1, 4])
def test_predict_takes_the_file_alone(
    run: Path, file: Path, many: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(many):
        noise = np.random.default_rng(number).integers(0, 256, (40 + number, 30), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    alone = tmp_path / "elsewhere.onnx"
    alone.write_bytes(file.read_bytes())
    found = lc.predict(alone, [tmp_path])
    own = lc.predict(run, [tmp_path])
    assert [one.image for one in found] == [one.image for one in own]
    assert len(found) == many
    for one, other in zip(found, own, strict=True):
        assert [each.name for each in one.classes] == [each.name for each in other.classes]
        logits = [[each.logit for each in which.classes] for which in (one, other)]
        assert logits[0] == pytest.approx(logits[1], abs=1e-5)
    assert main(["predict", str(alone), str(tmp_path / "0.png"), "--set", "device=cpu"]) == 2
    assert "has no recipe" in capsys.readouterr().err


def test_files_that_differ_are_not_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PixelsToLogits, "forward", lambda self, x: self.classifier.module(x.float() / 255))
    with pytest.raises(MismatchError, match=r"differ from the run's by up to [\d.]+ .* of 100 images"):
        lc.export(run, tmp_path / "wrong.pt2", format="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("difference", "scale", "agreement", "passes"),
    [(9e-5, 1.0, 1.0, True), (2e-4, 0.5, 1.0, False), (9e-4, 10.0, 1.0, True), (1e-6, 1.0, 0.9985, False)],
)
def test_parity_is_judged_by_difference_and_agreement(
    difference: float, scale: float, agreement: float, passes: bool
) -> None:
    parity = Parity(1000, difference, scale, agreement, "top1", 0.9, 0.9)
    if passes:
        parity.require("'f'", 1e-4)
        return
    with pytest.raises(MismatchError):
        parity.require("'f'", 1e-4)


class Airy(nn.Module):
    """An operator that ONNX lacks."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3)).expand(-1, 10)
        return torch.add(means, torch.special.airy_ai(means.detach()))


class Branch(nn.Module):
    """Control flow on values."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3)).expand(-1, 10)
        return means if means.sum() > 0 else means.neg()


def airy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1), Airy())


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1), Branch())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("airy", r"ONNX has no operator for aten\.special_airy_ai"),
        ("branch", r"cannot record `return means if means\.sum"),
    ],
)
def test_the_operator_explains_why_a_model_cannot_be_exported(
    name: str, reason: str, cache: Path, tmp_path: Path
) -> None:
    model = {"kind": "custom", "factory": f"{__name__}:{name}"}
    train(student(tmp_path / "run", cache, model=model, epochs=1, validation={"dataset": TEST_IMAGES}))
    with pytest.raises(RecipeError, match=reason):
        lc.export(tmp_path / "run", tmp_path / "model.onnx", [f"model.factory={__name__}:{name}"])
    assert not (tmp_path / "model.onnx").exists()


def test_help_and_training_import_no_onnx() -> None:
    code = (
        "import sys; from logitcache.cli.app import main; main(['export', '--help']);"
        "assert not {'torch', 'onnx'} & set(sys.modules); import logitcache.student.training;"
        "import logitcache.shipping.export;"
        "assert not {'onnx', 'onnxruntime', 'onnxscript', 'torchao'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
