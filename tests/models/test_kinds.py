"""Every kind of model builds, predicts and can be stored."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from logitcache.errors import RecipeError
from logitcache.models import (
    Architecture,
    Bundled,
    Classifier,
    Custom,
    Model,
    SmallCNN,
    bundled_directory,
    default_preprocessing,
    weights_digest,
)
from tests.models.nets import TINY_TIMM, custom, saved_run

KINDS = {
    member.model_fields["kind"].default
    for member in TypeAdapter(Model)._type.__origin__.__args__  # type: ignore[attr-defined]
}


def entry_of(kind: str, directory: Path) -> tuple[dict[str, Any], int]:
    """Return a recipe entry of each kind for seven classes, and its channels."""
    saved_run(directory / "run", SmallCNN(), 7, 1)
    weights = str(directory / "run" / "weights.safetensors")
    entries: dict[str, tuple[dict[str, Any], int]] = {
        "small_cnn": ({"width": 4, "depth": 2}, 1),
        "torchvision": ({"name": "resnet18", "weights": None}, 3),
        "timm": ({"name": TINY_TIMM, "pretrained": False}, 1),
        "checkpoint": ({"model": {"kind": "small_cnn"}, "path": weights}, 1),
        "run": ({"path": str(directory / "run")}, 1),
        "pruned": ({"path": str(directory / "run"), "macs": 0.6, "round_to": 2, "input_size": (28, 28)}, 1),
        "quantized": ({"path": str(directory / "run"), "input_size": (32, 32), "keep_float": ("3",)}, 1),
        "transformers": ({"path": str(directory / "vit")}, 3),
        "custom": (
            {
                "factory": "tests.models.nets:linear_model",
                "arguments": {"in_channels": 2, "num_classes": 7},
            },
            2,
        ),
    }
    fields, channels = entries[kind]
    return {"kind": kind, **fields}, channels


@pytest.mark.parametrize("kind", sorted(KINDS - {"bundled", "answers"}))
def test_every_kind_predicts_and_can_be_stored(kind: str, tmp_path: Path) -> None:
    if kind == "pruned":
        pytest.importorskip("torch_pruning", reason="removing channels needs the extra prune")
    if kind == "quantized":
        pytest.importorskip("torchao", reason="training for int8 needs the extra quant")
    if kind == "transformers":
        pytest.importorskip("transformers", reason="models of Hugging Face need the extra hf")
        importlib.import_module("tests.models.hugging_face").write_classifier(tmp_path / "vit", 7)
    entry, channels = entry_of(kind, tmp_path)
    model: Any = TypeAdapter(Model).validate_python(entry)
    built = model.build(7, channels)
    classifier = Classifier(built.module.eval(), default_preprocessing(channels))
    pixels = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    assert classifier(pixels).shape == (2, 7)
    architecture = model.architecture()
    assert TypeAdapter(Architecture).validate_json(architecture.model_dump_json()) == architecture
    again = architecture.build(7, channels).module
    again.load_state_dict(built.module.state_dict())
    assert weights_digest(again) == weights_digest(built.module)


def test_the_union_refuses_an_unknown_kind_and_field() -> None:
    with pytest.raises(ValidationError, match="kind"):
        TypeAdapter(Model).validate_python({"kind": "keras"})
    with pytest.raises(ValidationError, match="witdh"):
        TypeAdapter(Model).validate_python({"kind": "small_cnn", "witdh": 4})


@pytest.mark.skipif(
    not (bundled_directory("fashion_mnist") / "teacher.safetensors").is_file(),
    reason="the teacher is not trained yet",
)
def test_the_shipped_teacher_predicts_ten_classes_of_grey_images() -> None:
    built = Bundled().build(10, 1)
    assert built.preprocessing is not None
    pixels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    assert Classifier(built.module.eval(), built.preprocessing)(pixels).shape == (2, 10)
    with pytest.raises(RecipeError, match="10 classes, 37 are asked for"):
        Bundled().build(37, 1)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (28, 28), (224, 224)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_small_cnn_takes_any_size_and_channels(size: tuple[int, int], channels: int) -> None:
    module = SmallCNN().build(3, channels).module
    assert module(torch.zeros(2, channels, *size)).shape == (2, 3)


def test_small_cnn_is_small_as_student_and_as_teacher() -> None:
    def num_parameters(width: int) -> int:
        module = SmallCNN(width=width).build(10, 1).module
        return sum(p.numel() for p in module.parameters())

    assert 6_000 <= num_parameters(8) <= 10_000
    assert num_parameters(32) * 4 < 480_000


def test_small_cnn_asks_for_the_number_of_classes() -> None:
    with pytest.raises(RecipeError, match="how many classes"):
        SmallCNN().build(None, 1)


def test_a_factory_that_fails_or_returns_no_module_is_refused() -> None:
    with pytest.raises(RecipeError, match="Path"):
        Custom(factory="pathlib:Path").build(3, 1)
    with pytest.raises(RecipeError, match="in_channels"):
        custom("linear_model", in_channels="three").build(3, 1)
    with pytest.raises(RecipeError, match="no_such_module"):
        Custom(factory="no_such_module:fn").build(3, 1)
