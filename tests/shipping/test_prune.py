"""A pruned run computes what its parent computes without some channels or weights, and is a run like any other."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from logitcache.errors import LogitCacheError, MismatchError, MissingExtraError, RecipeError, Stopped
from logitcache.models import (
    Pruned,
    Run,
    SmallCNN,
    StoredModel,
    Timm,
    Torchvision,
    architecture_of,
    load_model,
    plain,
    save_model,
)
from logitcache.models.base import default_preprocessing
from logitcache.shipping.predict import predict
from logitcache.shipping.prune import prune
from logitcache.student.learner import Learner
from logitcache.student.runs.trained import load_student
from logitcache.student.training import train
from tests.student.small import TEST_IMAGES, student, weights

pytest.importorskip("torch_pruning", reason="removing channels needs the extra prune")

Architecture = SmallCNN | Torchvision | Timm
NETWORKS: dict[str, tuple[Architecture, int]] = {
    "small_cnn": (SmallCNN(width=16), 1),
    "resnet18": (Torchvision(name="resnet18", weights=None), 3),
    "mobilenet_v3_small": (Torchvision(name="mobilenet_v3_small", weights=None), 3),
    "convnext_atto": (Timm(name="convnext_atto", pretrained=False), 3),
}


def _saved(folder: Path, model: Architecture, channels: int, num_classes: int = 10) -> nn.Module:
    """Save a run of a network whose normalisations are random; its weights are those of a seed."""
    torch.manual_seed(0)
    module = model.build(num_classes, channels).module
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean, std=0.1)
    folder.mkdir(exist_ok=True)
    save_model(folder, module, _stored(model, channels, num_classes))
    return module.eval()


def _stored(model: Any, channels: int, num_classes: int = 10) -> StoredModel:
    described = default_preprocessing(channels)
    return StoredModel(model=model, preprocessing=described, num_classes=num_classes, in_channels=channels)


def _flops(module: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(images)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stored_pruned_network_is_the_one_that_was_pruned(name: str, tmp_path: Path) -> None:
    model, channels = NETWORKS[name]
    parent = _saved(tmp_path / "run", model, channels)
    entry = Pruned(path=str(tmp_path / "run"), macs=0.5, input_size=(32, 32))
    built = entry.build(10, channels).module.eval()
    module, architecture = plain(entry, built), architecture_of(entry, built)
    (tmp_path / "pruned").mkdir()
    save_model(tmp_path / "pruned", module, _stored(architecture, channels))
    images = torch.randn(3, channels, 32, 32)
    with torch.no_grad():
        loaded = load_model(tmp_path / "pruned").module.eval()(images)
        assert torch.equal(loaded, built(images))
    assert 0.2 * _flops(parent, images) < _flops(built, images) <= 0.5 * _flops(parent, images)
    assert entry.architecture() == architecture == Run(path=str(tmp_path / "pruned")).architecture()


def test_removing_channels_is_setting_them_to_zero(tmp_path: Path) -> None:
    """Oracle: the parent, in which removed channels leave their normalisation as zeros."""
    parent = _saved(tmp_path / "run", SmallCNN(width=16), 1)
    pruned = Pruned(path=str(tmp_path / "run"), macs=0.5, input_size=(28, 28)).build(10, 1).module.eval()
    removed = 0
    for before, after in zip(_norms(parent), _norms(pruned), strict=True):
        gone = ~torch.isin(before.weight, after.weight)
        assert int((~gone).sum()) == after.num_features
        removed += int(gone.sum())
        with torch.no_grad():
            before.weight[gone], before.bias[gone] = 0.0, 0.0
    assert removed > 0
    images = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), parent(images), rtol=1e-4, atol=1e-5)


def _norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def test_what_was_pruned_can_be_pruned_again_and_is_described_by_its_first_architecture(tmp_path: Path) -> None:
    _saved(tmp_path / "run", SmallCNN(width=32), 1)
    path, flops = "run", []
    for number in range(2):
        entry = Pruned(path=str(tmp_path / path), macs=0.6, input_size=(28, 28), round_to=2)
        built = entry.build(10, 1).module
        module, architecture = plain(entry, built), architecture_of(entry, built)
        path = f"pruned{number}"
        (tmp_path / path).mkdir()
        save_model(tmp_path / path, module, _stored(architecture, 1))
        assert json.loads((tmp_path / path / "model.json").read_text())["model"]["model"]["kind"] == "small_cnn"
        flops.append(_flops(load_model(tmp_path / path).module, torch.zeros(1, 1, 28, 28)))
    assert flops[1] <= 0.6 * flops[0]


def test_layers_of_the_user_s_choice_stay(tmp_path: Path) -> None:
    parent = _saved(tmp_path / "run", SmallCNN(width=16), 1)
    entry = Pruned(path=str(tmp_path / "run"), macs=0.8, input_size=(28, 28), round_to=1, unpruned=("0.4",))
    pruned = dict(entry.build(10, 1).module.named_modules())
    for name, part in parent.named_modules():
        if name.startswith("0.4.") and isinstance(part, nn.Conv2d):
            assert pruned[name].weight.shape == part.weight.shape


@pytest.fixture(scope="module")
def parent(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prune") / "parent"
    train(student(out, cache, epochs=1, model={"kind": "small_cnn", "width": 16}, validation={"dataset": TEST_IMAGES}))
    return out


FAST = ("epochs=1", "optimizer.lr=0.001", "ema=0.9")


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"sparsity": 0.75}], ids=["channels", "weights"])
def test_stopped_and_resumed_a_pruned_run_is_the_same_run(
    target: dict[str, float], parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(parent, tmp_path / "whole", FAST, **target)
    steps = iter(range(100))
    end_step = Learner.end_step

    def stopping(self: Learner) -> None:
        end_step(self)
        if next(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "end_step", stopping)
        with pytest.raises((KeyboardInterrupt, Stopped)):
            prune(parent, tmp_path / "run", (*FAST, "checkpoint_steps=1"), **target)
    again = prune(parent, tmp_path / "run", (*FAST, "checkpoint_steps=1"), **target, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert again.run.top1 == whole.run.top1


def test_weights_that_are_zero_stay_zero(parent: Path, tmp_path: Path) -> None:
    result = prune(parent, tmp_path / "run", FAST, sparsity=0.75)
    assert result.zeros == pytest.approx(0.75, abs=0.02)
    assert result.flops == result.flops_of_parent
    module = load_student(tmp_path / "run").classifier.module
    assert not any(parametrize.is_parametrized(part) for part in module.modules())
    before = {name: value.detach() for name, value in load_student(parent).classifier.module.named_parameters()}
    left = {name: value.detach() for name, value in module.named_parameters() if value.ndim > 1 and (value == 0).any()}
    largest = max(float(before[name][value == 0].abs().max()) for name, value in left.items())
    smallest = min(float(before[name][value != 0].abs().min()) for name, value in left.items())
    assert largest <= smallest  # of the parent's weights, the smallest of all layers went
    assert any(not torch.equal(before[name][value != 0], value[value != 0]) for name, value in left.items())


def test_a_run_begun_from_other_weights_is_refused(parent: Path, tmp_path: Path) -> None:
    shutil.copytree(parent, tmp_path / "parent")
    prune(tmp_path / "parent", tmp_path / "run", FAST, sparsity=0.5)
    module = load_model(tmp_path / "parent").module
    with torch.no_grad():
        next(module.parameters()).add_(0.5)
    save_model(tmp_path / "parent", module, StoredModel.model_validate_json((parent / "model.json").read_bytes()))
    with pytest.raises(MismatchError, match=r"parent\.weights"):
        prune(tmp_path / "parent", tmp_path / "run", (*FAST, "epochs=2"), sparsity=0.5, resume=True)


KINDS: dict[str, dict[str, Any]] = {
    "run": {"kind": "run"},
    "pruned": {"kind": "pruned", "macs": 0.5, "input_size": [28, 28]},
    "masked": {"kind": "pruned", "sparsity": 0.5},
    "quantized": {"kind": "quantized", "input_size": [28, 28]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_finishes_without_its_parent_and_does_not_resume_without_it(
    kind: str, parent: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "quantized":
        pytest.importorskip("torchao", reason="training for int8 needs the extra quant")
    shutil.copytree(parent, tmp_path / "parent")
    recipe = student(tmp_path / "run", cache, epochs=1, model={**KINDS[kind], "path": str(tmp_path / "parent")})
    end_step = Learner.end_step

    def without_parent(self: Learner) -> None:
        shutil.rmtree(tmp_path / "parent", ignore_errors=True)
        end_step(self)

    monkeypatch.setattr(Learner, "end_step", without_parent)
    train(recipe)
    assert load_student(tmp_path / "run").epoch == 1
    with pytest.raises(RecipeError, match=r"parent is not a run: (?s:.*)Fix: "):
        train(recipe.model_copy(update={"epochs": 2}), resume=True)


def test_a_share_of_the_time_becomes_a_share_of_multiply_adds(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that counts operations: the search then ends at the share that was asked for."""
    monkeypatch.setattr("logitcache.student.evaluation.cost.median_seconds", _as_flops)
    result = prune(parent, tmp_path / "run", FAST, latency=0.5, round_to=1)
    assert 0.3 * result.flops_of_parent < result.flops <= 0.5 * result.flops_of_parent
    chosen = load_student(tmp_path / "run").classifier
    monkeypatch.setattr("logitcache.student.evaluation.cost.median_seconds", _never)
    again = prune(parent, tmp_path / "run", FAST, latency=0.5, round_to=1, resume=True)
    assert again.flops == result.flops == _flops(chosen, torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def _as_flops(timed: Any, *_: object) -> list[float]:
    return [float(_flops(contender.model, pixels)) for contender, pixels in timed]


def _never(*_: object) -> list[float]:
    raise AssertionError("a run that began has chosen")


def test_a_pruned_run_is_trained_for_int8_and_exported(parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="training for int8 needs the extra quant")
    from logitcache.shipping.quantization.quantization_aware import train_quantized

    prune(parent, tmp_path / "pruned", FAST, macs=0.5)
    found = train_quantized(tmp_path / "pruned", tmp_path / "int8", ("epochs=1",))
    stored = json.loads((tmp_path / "int8/model.json").read_text())["model"]
    assert [stored["kind"], stored["model"]["kind"], stored["model"]["model"]["kind"]] == [
        *("quantized", "pruned_network", "small_cnn")
    ]
    assert found.parent == str(tmp_path / "pruned")
    (answer,) = predict(found.exported.file, [_picture(tmp_path)])
    assert answer.error is None
    with pytest.raises(RecipeError, match="prune before"):
        prune(tmp_path / "int8", tmp_path / "again", FAST, macs=0.5)


def _picture(folder: Path) -> Path:
    Image.new("L", (28, 28), 128).save(folder / "picture.png")
    return folder / "picture.png"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({}, "one of `macs` and `sparsity`"),
    "two": ({"macs": 0.5, "sparsity": 0.5}, "one of `macs` and `sparsity`"),
    "all": ({"macs": 1.0}, "less than 1"),
    "unknown layer": ({"macs": 0.5, "unpruned": ["nowhere"]}, "no layer 'nowhere'"),
    "unreachable": ({"macs": 0.01}, "cannot be reached"),
    "a model": ({"macs": 0.5, "overrides": ["model.width=3"]}, "the model is that of"),
    "a folder": ({"macs": 0.5, "overrides": ["out=elsewhere"]}, "the model is that of"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(case: str, parent: Path, tmp_path: Path) -> None:
    options, message = REFUSALS[case]
    with pytest.raises(RecipeError, match=message) as refused:
        prune(parent, tmp_path / "run", **options)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_network_that_the_tracer_cannot_follow_is_refused_with_the_fix(tmp_path: Path) -> None:
    model = Timm(name="vit_tiny_patch16_224", pretrained=False, options={"img_size": 32, "depth": 1})
    _saved(tmp_path / "run", model, 3)
    with pytest.raises(RecipeError, match=r"sparsity: 0\.5"):
        Pruned(path=str(tmp_path / "run"), macs=0.5, input_size=(32, 32)).build(10, 3)


def test_without_torch_pruning_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(tmp_path / "run", SmallCNN(width=16), 1)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"logitcache\[prune\]"):
        Pruned(path=str(tmp_path / "run"), macs=0.5, input_size=(28, 28)).build(10, 1)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a layer that is none": lambda stored: stored["sizes"].update({"nowhere": {"out_channels": 3}}),
    "an attribute that is none": lambda stored: stored["sizes"].update({"0.2": {"out_channels": 3}}),
    "groups that do not fit": lambda stored: stored["sizes"]["0.0"].update({"groups": 3}),
    "a parameter that is none": lambda stored: stored["shapes"].update({"0.0.nothing": [1]}),
    "more than before": lambda stored: stored["shapes"].update({"0.0.weight": [1 << 20, 1, 3, 3]}),
    "other axes": lambda stored: stored["shapes"].update({"0.0.weight": [8]}),
    "shapes that do not fit": lambda stored: stored["shapes"].update({"0.2.weight": [3]}),
    "no shapes": lambda stored: stored.update(shapes={}),
    "a huge image": lambda stored: stored.update(input_size=[1 << 20, 1 << 20]),
    "negative": lambda stored: stored["sizes"]["0.0"].update({"out_channels": -1}),
    "another attribute": lambda stored: stored["sizes"].update({"0.0": {"__class__": 3}}),
    "a pruned network inside": lambda stored: stored.update(model=json.loads(json.dumps(stored))),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_description_is_refused(case: str, tmp_path: Path) -> None:
    _saved(tmp_path / "run", SmallCNN(width=16), 1)
    entry = Pruned(path=str(tmp_path / "run"), macs=0.5, input_size=(28, 28))
    built = entry.build(10, 1).module
    module, architecture = plain(entry, built), architecture_of(entry, built)
    (tmp_path / "pruned").mkdir()
    save_model(tmp_path / "pruned", module, _stored(architecture, 1))
    stored = json.loads((tmp_path / "pruned/model.json").read_text())
    FORGERIES[case](stored["model"])
    (tmp_path / "pruned/model.json").write_text(json.dumps(stored))
    with pytest.raises(LogitCacheError) as refused:
        load_model(tmp_path / "pruned")
    assert refused.value.exit_code == 2
