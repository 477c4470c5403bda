"""int8 files: integer weights near the float ones, calibrated on unaugmented training images, compared with the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from logitcache.cli.app import main
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import load_model
from logitcache.shipping.exported import ExportedModel, open_exported
from logitcache.shipping.latency import FileLatency
from logitcache.shipping.parity import Parity
from logitcache.shipping.quantization.calibration import calibration_images
from logitcache.shipping.quantization.quantize import QuantizeResult, quantize, warn_if_slow
from logitcache.shipping.quantization.static_quantizer import StaticQuantizer
from logitcache.student.evaluation.open_run import read_run
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.bundled import Bundled
from tests.shipping.test_export import answers, expected, pixels
from tests.student.small import IMAGES

pytest.importorskip("onnxscript", reason="quantisation needs the extra export")
onnx: Any = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def measured(run: Path) -> QuantizeResult:
    out = run.parent / "int8.onnx"
    return quantize(run, out, num_images=40, keep_worst=1, least_agreement=0.0)


def test_weights_are_the_floats_in_whole_steps_of_each_channel(run: Path, tmp_path: Path) -> None:
    file = quantize(run, tmp_path / "int8.onnx", num_images=40, keep_worst=0, least_agreement=0.0).file
    graph = onnx.load(file).graph
    found = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    state = load_model(run).module.state_dict()
    name = "classifier.module.3.weight"
    steps, scales = found[f"{name}_quantized"], found[f"{name}_scale"]
    assert steps.dtype == np.int8
    floats = state["3.weight"].numpy()
    channels = scales[:, None] if scales.shape == (10,) else scales
    restored = steps * channels if steps.shape == floats.shape else (steps * scales).T
    assert np.abs(restored - floats).max() <= 0.5001 * scales.max()


def test_the_layer_that_alone_costs_most_stays_in_float(measured: QuantizeResult) -> None:
    errors = [row.error for row in measured.sensitivity]
    assert errors == sorted(errors, reverse=True)
    assert measured.keep_float == (measured.sensitivity[0].layer,)
    assert {row.layer for row in measured.sensitivity} == {"0.0", "0.4.body.0", "0.4.body.3", "0.5"} | {
        "0.8.body.0",
        "0.8.body.3",
        "3",
    }
    kept = f"classifier.module.{measured.keep_float[0]}.weight"
    kinds = {each.name: each.data_type for each in onnx.load(measured.file).graph.initializer}
    assert kinds[kept] == onnx.TensorProto.FLOAT
    assert sum(kind == onnx.TensorProto.INT8 for name, kind in kinds.items() if name.endswith("_quantized")) >= 6
    assert measured.operators["integer"] >= 6


def test_the_figures_are_those_of_another_way(run: Path, measured: QuantizeResult) -> None:
    own, other = expected(run, pixels()), answers(Path(measured.file), pixels().numpy())
    assert measured.parity.agreement == (own.argmax(axis=1) == other.argmax(axis=1)).mean()
    assert measured.parity.largest_difference == pytest.approx(np.abs(own - other).max(), abs=1e-5)
    assert 0 < measured.parity.largest_difference < 0.2 * np.abs(own).max()
    assert open_exported(measured.file).metadata.arithmetic == "int8"


def test_calibration_takes_training_images_without_augmentation(run: Path, file: Path) -> None:
    images = open_dataset(Bundled.model_validate(IMAGES))
    found = calibration_images(run, read_run(run), open_exported(file).metadata, 5)
    assert torch.equal(found, torch.stack([images.read(index) for index in (0, 50, 100, 149, 199)]))


def test_predict_takes_int8_files(measured: QuantizeResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(1)[0, 0].numpy()).save(tmp_path / "shoe.png")
    assert main(["predict", measured.file, str(tmp_path / "shoe.png"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    logits = answers(Path(measured.file), pixels(1).numpy())[0]
    assert [each["logit"] for each in found["classes"]] == pytest.approx(sorted(logits, reverse=True)[:5], abs=1e-6)


def test_pt2e_quantises_after_training_too(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="PT2E needs the extra quant")
    found = quantize(run, tmp_path / "pt2e.onnx", method="pt2e", num_images=40, keep_float=["0.0"], least_agreement=0.0)
    own, other = expected(run, pixels()), answers(Path(found.file), pixels().numpy())
    assert np.abs(own - other).max() < 0.2 * np.abs(own).max()
    kinds = [each.data_type for each in onnx.load(found.file).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) >= 6
    assert found.operators["integer"] >= 6
    assert found.parity.agreement == (own.argmax(axis=1) == other.argmax(axis=1)).mean()


def test_unknown_layers_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.onnx"
    assert main(["quantize", str(run), str(out), "--keep-float", "0.4.body.1", "--images", "4"]) == 2
    assert "Did you mean '0.4.body." in capsys.readouterr().err
    assert not out.exists()


def test_a_graph_without_layers_is_refused(file: Path) -> None:
    exported: ExportedModel = open_exported(file)
    model = onnx.load(file)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            node.op_type = "Identity"
    with pytest.raises(RecipeError, match="no convolution and no linear layer"):
        StaticQuantizer(model.SerializeToString(), pixels(2), exported.metadata)


def test_a_run_whose_weights_are_nan_is_refused(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    state = load_file(broken / "weights.safetensors")
    floats = {name: torch.full_like(value, torch.nan) for name, value in state.items() if value.is_floating_point()}
    save_file(state | floats, broken / "weights.safetensors")
    with pytest.raises(RecipeError, match=r"answers NaN or infinity.*Fix: "):
        quantize(broken)
    assert not (broken / "model.int8.onnx").exists()


def test_too_few_equal_answers_are_refused() -> None:
    parity = Parity(200, 0.1, 1.0, 0.895, "top1", 0.9, 0.8)
    parity.require_agreement("'f'", 0.89)
    with pytest.raises(MismatchError, match=r"89\.50 % of 200 images, at least 90 %"):
        parity.require_agreement("'f'", 0.9)


def test_what_is_not_faster_is_reported(measured: QuantizeResult, caplog: pytest.LogCaptureFixture) -> None:
    rows = (FileLatency(1, 2, 0.1, 0.2, 0.5), FileLatency(32, 2, 0.2, 0.1, 2.0))
    warn_if_slow(measured.file, 0, rows)
    told = [record.getMessage() for record in caplog.records if "not faster" in record.getMessage()]
    assert len(told) == 1
    assert "0.50 times the speed of float at batch 1 and 2 threads" in told[0]
