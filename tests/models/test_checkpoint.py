"""The user's own weights: read whatever wrote them, refused when they do not fit or would run code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import (
    Checkpoint,
    SmallCNN,
    Timm,
    weights_digest,
)
from tests.models.nets import LINEAR, TINY_TIMM, Tied, custom, state_of, written


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "a"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_checkpoint_is_read_whatever_wrote_it(name: str, prefix: str, tmp_path: Path) -> None:
    trained = LINEAR.build(None, 1).module
    state = {prefix + key: value for key, value in state_of(trained).items()}
    path = written(tmp_path / name, state)
    loaded = Checkpoint(model=LINEAR, path=path).build(None, 1)
    assert weights_digest(loaded.module) == weights_digest(trained)
    assert loaded.preprocessing is None


@pytest.mark.parametrize("key", ["state_dict", "model", "anything"])
def test_a_nested_checkpoint_is_unwrapped(key: str, tmp_path: Path) -> None:
    trained = LINEAR.build(None, 1).module
    path = written(tmp_path / "a.pt", {key: state_of(trained), "epoch": 3, "optimizer": {"lr": 1}})
    loaded = Checkpoint(model=LINEAR, path=path).build(None, 1).module
    assert weights_digest(loaded) == weights_digest(trained)


def test_of_several_sets_of_weights_the_user_chooses(tmp_path: Path) -> None:
    first, second = LINEAR.build(None, 1).module, LINEAR.build(None, 1).module
    content = {"model": state_of(first), "ema": {"model": state_of(second)}, "old": state_of(first)}
    path = written(tmp_path / "a.pt", content)
    with pytest.raises(RecipeError, match="several sets of weights: model, old"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    loaded = Checkpoint(model=LINEAR, path=path, key="ema.model").build(None, 1).module
    assert weights_digest(loaded) == weights_digest(second)
    with pytest.raises(RecipeError, match="no weights under 'eam'"):
        Checkpoint(model=LINEAR, path=path, key="eam").build(None, 1)


def test_a_prefix_selects_and_is_proposed(tmp_path: Path) -> None:
    trained = LINEAR.build(None, 1).module
    state = {f"net.{key}": value for key, value in state_of(trained).items()}
    path = written(tmp_path / "a.safetensors", state | {"loss.scale": torch.ones(1)})
    with pytest.raises(RecipeError, match=r"Missing in the file \(2\)(.|\n)*`prefix: net\.`"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    loaded = Checkpoint(model=LINEAR, path=path, prefix="net.").build(None, 1).module
    assert weights_digest(loaded) == weights_digest(trained)
    with pytest.raises(RecipeError, match=r"begins with 'nte\.'; the first are loss.scale"):
        Checkpoint(model=LINEAR, path=path, prefix="nte.").build(None, 1)


def test_missing_surplus_and_misshapen_names_are_all_told(tmp_path: Path) -> None:
    state = {"2.weight": torch.zeros(37, 4), "2.scale": torch.zeros(1)}
    path = written(tmp_path / "a.safetensors", state)
    with pytest.raises(RecipeError) as caught:
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    message = str(caught.value)
    assert "Missing in the file (1): 2.bias" in message
    assert "Not in the model (1): 2.scale" in message
    assert "2.weight is [37, 4], not [3, 4]" in message


def test_a_checkpoint_says_how_many_classes_it_has(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", state_of(SmallCNN().build(37, 1).module))
    built = Checkpoint(model=SmallCNN(), path=path, num_classes=37).build(None, 1)
    assert built.module(torch.zeros(1, 1, 8, 8)).shape == (1, 37)


def test_a_checkpoint_downloads_nothing_for_its_architecture(tmp_path: Path) -> None:
    trained = Timm(name=TINY_TIMM, pretrained=False).build(5, 3).module
    path = written(tmp_path / "a.pt", state_of(trained))
    loaded = Checkpoint(model=Timm(name=TINY_TIMM), path=path).build(5, 3).module
    assert weights_digest(loaded) == weights_digest(trained)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = written(tmp_path / "a.pt", {"model": Malicious(target)})
    with pytest.raises(RecipeError, match=r"could run code(.|\n)*save_file"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    assert not target.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="could run code"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("damage", ["empty", "noise", "truncated"])
def test_a_damaged_file_is_an_error_that_names_it(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    written(path, state_of(LINEAR.build(None, 1).module))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "noise": b"\x93no\n" * 99, "truncated": whole[:-40]}[damage])
    with pytest.raises(RecipeError, match=name):
        Checkpoint(model=LINEAR, path=str(path)).build(None, 1)


def test_a_missing_file_and_a_file_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no weights file"):
        Checkpoint(model=LINEAR, path=str(tmp_path / "none.pt")).build(None, 1)
    for content in ({"epoch": 3}, torch.zeros(3), {}, [1]):
        path = written(tmp_path / "a.pt", content)
        with pytest.raises(RecipeError, match="no named tensors"):
            Checkpoint(model=LINEAR, path=path).build(None, 1)
    path = written(tmp_path / "a.safetensors", {})
    with pytest.raises(RecipeError, match="no named tensors"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)


def test_weights_that_were_tied_are_stored_once_and_loaded_twice(tmp_path: Path) -> None:
    trained = Tied()
    path = written(tmp_path / "a.safetensors", {"first.weight": trained.first.weight.detach()})
    loaded = Checkpoint(model=custom("Tied"), path=path).build(None, 1).module
    assert weights_digest(loaded) == weights_digest(trained)
