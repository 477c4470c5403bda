"""Run directories as models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from logitcache.errors import RecipeError
from logitcache.models import (
    Checkpoint,
    Run,
    SmallCNN,
    StoredModel,
    Timm,
    Torchvision,
    load_model,
    save_model,
    weights_digest,
)
from tests.models.nets import GREY, LINEAR, RGB, TINY_TIMM, custom, saved_run, state_of, written


@pytest.mark.parametrize(
    "model",
    [
        SmallCNN(width=3),
        Torchvision(name="squeezenet1_1", weights=None),
        Timm(name=TINY_TIMM, pretrained=False),
    ],
    ids=lambda model: model.kind,
)
def test_a_run_is_a_model(model: Any, tmp_path: Path) -> None:
    module = saved_run(tmp_path / "run", model, 6, 3)
    built = Run(path=str(tmp_path / "run")).build(6, 3)
    assert built.preprocessing == RGB
    assert weights_digest(built.module) == weights_digest(module)


@pytest.mark.parametrize("name", ["Tied", "Wrapped"])
def test_a_run_of_a_custom_model_needs_its_factory_again(name: str, tmp_path: Path) -> None:
    module = saved_run(tmp_path / "run", custom(name), 4, 1)
    with pytest.raises(RecipeError, match=f"factory: tests.models.nets:{name}"):
        load_model(tmp_path / "run")
    built = Run(path=str(tmp_path / "run"), factory=f"tests.models.nets:{name}").build(None, 1)
    assert weights_digest(built.module) == weights_digest(module)


def test_a_stored_factory_is_never_called(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", LINEAR, 3, 1)
    description = tmp_path / "run" / "model.json"
    harm = description.read_text().replace("tests.models.nets:linear_model", "os:abort")
    description.write_text(harm)
    with pytest.raises(RecipeError, match="never called"):
        Run(path=str(tmp_path / "run")).build(None, 1)
    factory = "tests.models.nets:linear_model"
    assert Run(path=str(tmp_path / "run"), factory=factory).build(None, 1).module is not None


def test_a_factory_for_a_run_that_needs_none_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", SmallCNN(), 3, 1)
    with pytest.raises(RecipeError, match="leave it out"):
        load_model(tmp_path / "run", "os:abort")


def test_a_run_with_other_classes_or_channels_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", SmallCNN(), 3, 1)
    run = Run(path=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match="predicts 3 classes, 4 are asked for"):
        run.build(4, 1)
    with pytest.raises(RecipeError, match=r"1 channels, the images have 3(.|\n)*mode: L"):
        run.build(3, 3)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a run"):
        load_model(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/recipe.yaml").write_text("{}")
    with pytest.raises(
        RecipeError, match=r"has not finished(?s:.*)Fix: wait .*if it has stopped, run the same command with --resume"
    ):
        load_model(tmp_path / "begun")
    saved_run(tmp_path / "run", SmallCNN(), 3, 1)
    (tmp_path / "run" / "weights.safetensors").unlink()
    with pytest.raises(RecipeError, match="--resume"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text('{"model": 3}')
    with pytest.raises(RecipeError, match=r"model\.json cannot be read"):
        load_model(tmp_path / "run")


def test_a_student_of_a_checkpoint_is_stored_without_the_checkpoints_path(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", state_of(SmallCNN().build(3, 1).module))
    saved_run(tmp_path / "run", Checkpoint(model=SmallCNN(), path=path), 3, 1)
    Path(path).unlink()
    assert "a.pt" not in (tmp_path / "run" / "model.json").read_text()
    assert load_model(tmp_path / "run").preprocessing == GREY


def test_channels_last_weights_are_stored_in_plain_order(tmp_path: Path) -> None:
    stored = StoredModel(model=SmallCNN(), preprocessing=RGB, num_classes=3, in_channels=3)
    module = SmallCNN().build(3, 3).module.to(memory_format=torch.channels_last)
    save_model(tmp_path, module, stored)
    read = load_file(tmp_path / "weights.safetensors")
    assert all(value.is_contiguous() for value in read.values())
    assert weights_digest(load_model(tmp_path).module) == weights_digest(module)


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    module = SmallCNN().build(3, 1).module
    stored = StoredModel(model=SmallCNN(), preprocessing=GREY, num_classes=3, in_channels=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, module, stored)
    for file in ("model.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
