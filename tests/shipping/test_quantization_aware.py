"""Training for int8 from the cache: an ordinary run that resumes bit by bit and leaves an int8 file."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.cli.app import main
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import Classifier, Preprocessing, Quantized, SmallCNN, load_model, read_stored
from logitcache.models.quantization.fake_quantization import FakeQuantized, imitate_int8, to_float, to_int8
from logitcache.shipping.export import export
from logitcache.shipping.parity import Parity
from logitcache.shipping.quantization.quantization_aware import quantization_aware_recipe, train_quantized
from logitcache.shipping.quantization.static_quantizer import count_fused
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.runs.training_run import TrainingRun
from logitcache.student.training import train
from tests.shipping.test_export import answers, pixels
from tests.student.ranks import together
from tests.student.small import student, weights

pytest.importorskip("torchao", reason="training for int8 needs the extra quant")
onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
CHANGES = ["epochs=2", "checkpoint_steps=3", "ema=0.9"]


@pytest.fixture(scope="module")
def quantized(run: Path) -> Path:
    out = run.parent / "qat"
    assert main(["quantize", str(run), str(out), "--qat", *[w for each in CHANGES for w in ("--set", each)]]) == 0
    return out


def test_the_run_is_one_as_any_other_and_names_its_parent(run: Path, quantized: Path) -> None:
    stored = read_stored(quantized / "model.json").model
    assert isinstance(stored, Quantized)
    assert stored.model == read_stored(run / "model.json").model
    environment = json.loads((quantized / "environment.json").read_text())["learns_from"]
    of_parent = json.loads((run / "environment.json").read_text())["learns_from"]
    assert len(environment.pop("parent")["weights"]) == 64
    assert environment == of_parent
    assert evaluate(quantized, ["device=cpu"]).measures.quality == pytest.approx(
        json.loads((quantized / "result.json").read_text())["top1"]
    )


def test_the_file_computes_on_integers_what_training_imitated(quantized: Path) -> None:
    file = quantized / "model.int8.onnx"
    network = load_model(quantized).module.eval()
    with torch.no_grad():
        own = network((pixels() / 255 - 0.5) / 0.5).numpy()
    found = answers(file, pixels().numpy())
    assert np.abs(found - own).max() < 0.2 * np.abs(own).max()
    kinds = [each.data_type for each in onnx.load(file).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) >= 7
    assert main(["predict", str(quantized), "no.png"]) == 2


def test_the_integer_operators_of_the_file_are_counted_and_a_slow_one_is_reported(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((quantized / "model.int8.onnx.json").read_text())["measured"]
    assert record["operators"] == count_fused((quantized / "model.int8.onnx").read_bytes(), "x")
    assert record["operators"]["integer"] >= 6
    timed: list[list[torch.Tensor]] = []

    def twice_as_long(calls: Any, *_: object) -> list[float]:
        timed.append([call() for call in calls])
        return [0.1, 0.2]

    monkeypatch.setattr("logitcache.shipping.latency.time_in_turns", twice_as_long)
    plan = LatencyPlan(batch_sizes=(3,), threads=(1,))
    found = export(quantized, tmp_path / "model.onnx", least_agreement=0.0, latency=plan)
    assert [row.speed_up for row in found.latencies] == [0.5]
    assert "0.50 times the speed of float at batch 3" in caplog.text
    in_float, in_int8 = timed[0]
    trained = load_model(quantized).module
    assert isinstance(trained, FakeQuantized)
    network = to_float(trained)
    with torch.no_grad():
        assert torch.allclose(network((pixels(1).expand(3, 1, 28, 28) / 255 - 0.5) / 0.5), in_float, atol=1e-5)
    assert not torch.allclose(in_int8, in_float, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_train_one_network_for_int8_and_the_first_exports_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    out = tmp_path / "qat"

    def work(rank: int) -> None:
        found = train_quantized(run, out, ["epochs=2", "ema=0.9"], least_agreement=0.0)
        (tmp_path / f"{rank}.json").write_text(json.dumps(asdict(found)))

    ended = together(2, tmp_path / "ranks", work)
    assert [code for code, _ in ended] == [0, 0], ended
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    network = load_model(out).module.eval()
    with torch.no_grad():
        own = network((pixels() / 255 - 0.5) / 0.5).numpy()
    found = answers(out / "model.int8.onnx", pixels().numpy())
    assert np.abs(found - own).max() < 0.2 * np.abs(own).max()
    alone = train_quantized(run, tmp_path / "alone", ["epochs=2", "ema=0.9"], least_agreement=0.0)
    assert json.loads((tmp_path / "0.json").read_text())["trained"]["loss"] == pytest.approx(
        alone.trained.loss, rel=0.05
    )


class Killed(RuntimeError):
    pass


@pytest.mark.parametrize("at", [5, 9])
def test_killed_and_resumed_gives_the_same_bytes(
    at: int, run: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, out = TrainingRun.step, tmp_path / "qat"

    def killed(self: TrainingRun, batch: Any) -> None:
        if self.learner.step == at:
            raise Killed
        step(self, batch)

    recipe = quantization_aware_recipe(run, out, CHANGES)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step", killed)
        with pytest.raises(Killed):
            train(recipe)
    assert not (out / "weights.safetensors").exists()
    train(recipe, resume=True)
    assert weights(out) == weights(quantized)
    assert weights(out) != weights(run)


def test_another_parent_is_refused(run: Path, quantized: Path, tmp_path: Path, cache: Path) -> None:
    other = tmp_path / "other"
    train(student(other, cache, epochs=1, seed=5))
    recipe = quantization_aware_recipe(run, quantized, [*CHANGES, "epochs=3"])
    assert recipe.model is not None
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(other)})})
    with pytest.raises(MismatchError):
        train(changed, resume=True)


def test_a_tenth_of_epochs_and_learning_rate_unless_set(cache: Path, run: Path, tmp_path: Path) -> None:
    found = quantization_aware_recipe(run, tmp_path / "x")
    assert (found.epochs, found.optimizer.lr) == (1, pytest.approx(1e-4))
    assert quantization_aware_recipe(run, tmp_path / "x", ["optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_what_cannot_be_trained_for_int8_is_refused_with_the_reason(run: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="quantised already"):
        train_quantized(quantized, tmp_path / "again")
    losses = "losses=[{kind: kl_divergence}, {kind: similarity, student: '0', teacher_feature: x}]"
    with pytest.raises(RecipeError):
        train_quantized(run, tmp_path / "taps", [losses])
    with pytest.raises(RecipeError, match=r"Did you mean '0\.4\.body\.\d'"):
        imitate_int8(SmallCNN(width=2).build(10, 1).module, 1, (28, 28), ["0.4.body.9"])
    with pytest.raises(RecipeError, match="no convolution or linear layer"):
        imitate_int8(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), 1, (8, 8))
    assert main(["quantize", str(run), "--qat"]) == 2
    for option in (["--method", "pt2e"], ["--images", "4"], ["--keep-worst", "1"], ["--sensitivity"]):
        assert main(["quantize", str(run), str(tmp_path / "unused"), "--qat", *option]) == 2
    assert not (tmp_path / "unused").exists()
    assert main(["quantize", str(run), "--resume"]) == 2


def test_commands_that_ask_for_equal_answers_take_the_options_that_their_error_names(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(quantized), str(tmp_path / "model.onnx"), "--least-agreement", "0", "-q"]) == 0
    with pytest.raises(MismatchError) as error:
        Parity(100, 0.1, 1.0, 0.5, "top1", 0.5, 0.5).require_agreement("the file", 0.9)
    named = re.findall(r"--[a-z-]+", str(error.value))
    assert named
    for command in ("export", "quantize"):
        capsys.readouterr()
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert [option for option in named if option not in shown] == []


def test_the_least_agreement_of_the_caller_holds_for_the_file(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="at least 110 %"):
        export(quantized, tmp_path / "model.onnx", least_agreement=1.1)
    assert not (tmp_path / "model.onnx").exists()


def test_layers_that_are_kept_have_no_quantiser() -> None:
    network = SmallCNN(width=2).build(10, 1).module
    every, kept = (imitate_int8(network, 1, (28, 28), names) for names in ((), ("3",)))

    def quantisers(of: FakeQuantized) -> int:
        return sum(hasattr(module, "fake_quant_enabled") for module in of.modules())

    assert quantisers(kept) == quantisers(every) - 3  # of its input, weight and output
    images = torch.rand(4, 1, 28, 28)
    kept.train()(images)
    with torch.no_grad():
        assert torch.allclose(to_int8(kept.eval())(images), kept(images), atol=1e-5)


def test_evaluation_moves_nothing() -> None:
    network = Classifier(
        imitate_int8(SmallCNN(width=2).build(10, 1).module, 1, (28, 28)),
        Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    network.train()(pixels(8))
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(pixels(50))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.train()(pixels(50))
    assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())


class Reused(nn.Module):
    """An activation in place on what is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.first(images)
        torch.relu_(found)
        return torch.as_tensor(self.second(found.mean(dim=(2, 3))) + found.amax(dim=(1, 2, 3))[:, None])


def test_operations_in_place_mean_the_same() -> None:
    network = Reused().eval()
    images = torch.rand(4, 1, 8, 8) - 0.5
    fake = imitate_int8(network, 1, (8, 8))
    fake.train()(images)
    with torch.no_grad():
        own = network(images)
        assert (fake.eval()(images) - own).abs().max() < 0.05 * own.abs().max()
