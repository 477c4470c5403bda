"""The user's own weights: read whatever wrote them, refused when they do not fit or would run code."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import (
    Checkpoint,
    SmallCNN,
    Timm,
    weights_digest,
)
from logitcache.runtime.console import configure
from tests.models.nets import LINEAR, TINY_TIMM, Tied, custom, state_of, written


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "a"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."])
def test_a_checkpoint_is_read_whatever_wrote_it(name: str, prefix: str, tmp_path: Path) -> None:
    trained = LINEAR.build(None, 1).module
    state = {prefix + key: value for key, value in state_of(trained).items()}
    path = written(tmp_path / name, state)
    loaded = Checkpoint(model=LINEAR, path=path).build(None, 1)
    assert weights_digest(loaded.module) == weights_digest(trained)
    assert loaded.preprocessing is None


@pytest.mark.parametrize(
    ("factory", "wrapped"),
    [
        ("Wrapped", "_orig_mod.module.module.{}"),  # the network's own names begin as a wrapper's do
        ("Wrapped", "module.{}"),
        ("Tied", "first._orig_mod.{}"),  # one compiled layer
        ("Tied", "_fsdp_wrapped_module.first._checkpoint_wrapped_module.{}"),
    ],
)
def test_wrappers_are_taken_off_wherever_they_are(factory: str, wrapped: str, tmp_path: Path) -> None:
    trained = custom(factory).build(None, 1).module
    names = {name.rpartition(".")[2]: value for name, value in state_of(trained).items()}
    path = written(tmp_path / "a.safetensors", {wrapped.format(name): value for name, value in names.items()})
    loaded = Checkpoint(model=custom(factory), path=path).build(None, 1).module
    assert weights_digest(loaded) == weights_digest(trained)


def test_names_that_would_become_one_are_left_as_they_are(tmp_path: Path) -> None:
    state = state_of(LINEAR.build(None, 1).module)
    both = state | {f"module.{name}": value + 1 for name, value in state.items()}
    with pytest.raises(RecipeError, match=r"Not in the model \(2\): module\.2\.bias") as refused:
        Checkpoint(model=LINEAR, path=written(tmp_path / "a.safetensors", both)).build(None, 1)
    loaded = Checkpoint(model=LINEAR, path=str(tmp_path / "a.safetensors"), prefix=_proposed(refused.value))
    assert torch.equal(loaded.build(None, 1).module.state_dict()["2.bias"], state["2.bias"] + 1)


def _proposed(error: RecipeError) -> str:
    """The prefix that a refusal proposes."""
    found = re.search("Fix: `prefix: (.+)` takes", str(error))
    assert found is not None, str(error)
    return found[1]


def test_the_average_of_weights_that_torch_writes_is_read(tmp_path: Path) -> None:
    trained = SmallCNN().build(3, 1).module
    averaged = torch.optim.swa_utils.AveragedModel(trained, use_buffers=True)
    state = state_of(averaged)
    state |= {name: value.float() for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert "n_averaged" in state
    loaded = Checkpoint(model=SmallCNN(), path=written(tmp_path / "a.pt", state)).build(3, 1).module
    assert weights_digest(loaded) == weights_digest(trained)


def test_buffers_that_the_model_computes_are_skipped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    options = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "img_size": 56}
    swin = Timm(name="swin_tiny_patch4_window7_224", pretrained=False, options=options)
    trained = swin.build(5, 3).module
    computed = {name: value for name, value in trained.named_buffers() if name not in trained.state_dict()}
    assert {name.rpartition(".")[2] for name in computed} == {"relative_position_index", "attn_mask"}
    old = state_of(trained) | {name: torch.zeros(3, dtype=torch.int64) for name in computed}
    path = written(tmp_path / "old.safetensors", {f"module.{name}": value for name, value in old.items()})
    loaded = Checkpoint(model=swin, path=path).build(5, 3).module
    assert weights_digest(loaded) == weights_digest(trained)
    for name, value in loaded.named_buffers():
        assert torch.equal(value, trained.get_buffer(name))
    assert f"({len(computed)} in all)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("cast", [torch.Tensor.int, torch.Tensor.bool, torch.Tensor.cfloat])
def test_weights_of_another_kind_of_number_are_refused(name: str, cast: Any, tmp_path: Path) -> None:
    trained = state_of(LINEAR.build(None, 1).module)
    try:
        path = written(tmp_path / name, trained | {"2.weight": cast(trained["2.weight"])})
    except KeyError:
        assert cast is torch.Tensor.cfloat
        pytest.skip("an old release of safetensors, which writes no complex numbers")
    with pytest.raises(RecipeError, match=r"2\.weight is (integer|complex), not floating-point"):
        Checkpoint(model=LINEAR, path=path).build(None, 1)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    state = state_of(LINEAR.build(None, 1).module)
    for value in (state["2.weight"].to("meta"), state["2.weight"].to_sparse()):
        path = written(tmp_path / "a.pt", state | {"2.weight": value})
        with pytest.raises(RecipeError, match=r"2\.weight is no plain tensor"):
            Checkpoint(model=LINEAR, path=path).build(None, 1)


def test_lower_precision_is_read(tmp_path: Path) -> None:
    trained = state_of(LINEAR.build(None, 1).module)
    path = written(tmp_path / "a.safetensors", {name: value.bfloat16() for name, value in trained.items()})
    loaded = Checkpoint(model=LINEAR, path=path).build(None, 1).module.state_dict()
    assert all(torch.equal(loaded[name], value.bfloat16().float()) for name, value in trained.items())


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
    with pytest.raises(RecipeError, match=r"Missing in the file \(2\)(.|\n)*`prefix: net\.`") as refused:
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    loaded = Checkpoint(model=LINEAR, path=path, prefix=_proposed(refused.value)).build(None, 1).module
    assert weights_digest(loaded) == weights_digest(trained)
    with pytest.raises(RecipeError, match=r"begins with 'nte\.'; the first are loss.scale"):
        Checkpoint(model=LINEAR, path=path, prefix="nte.").build(None, 1)


@pytest.mark.parametrize("outer", ["module.student.", "student._orig_mod.", "module.student._orig_mod.net."])
def test_the_proposed_prefix_counts_wrappers(outer: str, tmp_path: Path) -> None:
    trained = SmallCNN().build(3, 1).module
    state = {f"{outer}{key}": value for key, value in state_of(trained).items()}
    path = written(tmp_path / "a.safetensors", state | {"module.teacher.weight": torch.ones(1)})
    with pytest.raises(RecipeError) as refused:
        Checkpoint(model=SmallCNN(), path=path).build(3, 1)
    loaded = Checkpoint(model=SmallCNN(), path=path, prefix=_proposed(refused.value)).build(3, 1).module
    assert weights_digest(loaded) == weights_digest(trained)


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
    with pytest.raises(RecipeError, match=r"could run code(.|\n)*save_file") as refused:
        Checkpoint(model=LINEAR, path=path).build(None, 1)
    assert not target.exists()
    shown = "".join(traceback.format_exception(refused.value, limit=0))  # as --debug shows it
    assert not re.search("weights_only|trust|load it|still be loaded", shown)
    fix = str(refused.value).splitlines()[-1].strip()
    model = LINEAR.build(None, 1).module
    exec(
        fix.replace("weights.safetensors", f"{tmp_path}/weights.safetensors"),
        {"safetensors": safetensors, "model": model},
    )
    assert Checkpoint(model=LINEAR, path=f"{tmp_path}/weights.safetensors").build(None, 1)


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
