"""A run folder is data: what it describes is built within what its weights hold, or refused with one error."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models  # what importing takes is not the loading of a run
import torch
from safetensors.torch import load_file, save_file

from logitcache.errors import LogitCacheError, RecipeError, RefusedError
from logitcache.models import Run, SmallCNN, Timm, Torchvision, load_model, weights_digest
from tests.models.nets import TINY_TIMM, saved_run

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saved_run(tmp_path / "run", SmallCNN(width=2), 3, 1)
    return tmp_path / "run"


def _described(run: Path, **changes: Any) -> None:
    """Change model.json, as somebody else would."""
    stored = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(stored | changes))


def _peak() -> int:
    """The most memory that the process had so far, in kilobytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _refused(run: Path, message: str, kind: type[LogitCacheError] = RecipeError) -> LogitCacheError:
    """Load a run and check the recipe that names it; both must fail soon, in little memory, with one error."""
    errors = []
    for read in (lambda: load_model(run), Run(path=str(run)).architecture):
        started, before = time.process_time(), _peak()
        with pytest.raises(kind, match=message) as refused:
            read()
        assert time.process_time() - started < 2
        assert _peak() - before < 300 << 10
        assert refused.value.exit_code == 2
        assert len(str(refused.value)) < 1500
        errors.append(refused.value)
    return errors[0]


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "small_cnn", "width": 1000},
        {"kind": "torchvision", "name": "regnet_y_16gf", "weights": None},  # its constructor computes with values
        {"kind": "torchvision", "name": "vit_h_14", "weights": "DEFAULT"},  # weights are never fetched
        {"kind": "timm", "name": "vit_giant_patch14_dinov2.lvd142m", "pretrained": True},
    ],
    ids=lambda model: str(model.get("name", model)),
)
def test_a_network_that_is_larger_than_the_weights_is_not_built(model: dict[str, Any], run: Path) -> None:
    _described(run, model=model, in_channels=3, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    _refused(run, "describes another network than weights.safetensors holds")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 10**12},
        {"num_classes": 0},
        {"num_classes": "3"},
        {"num_classes": 10**400},
        {"in_channels": 10**6},
        {"preprocessing": {"mean": [0.5], "std": [0.5], "input_size": 10**6}},
        {"preprocessing": {"mean": [0.5], "std": [0.5], "input_size": [5000, 2]}},
        {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        {"preprocessing": {"mean": ["0.5"], "std": [float("nan")]}},
        {"model": {"kind": "run", "path": "."}},
        {"model": {"kind": "checkpoint", "path": "x", "model": {"kind": "small_cnn"}}},
        {"more": 1},
        {"model": {"kind": "timm", "name": TINY_TIMM, "options": {"depths": [10**9] * 4}}},
        {"model": {"kind": "timm", "name": TINY_TIMM, "options": {"drop_rate": [[0]] * 700_000}}},
        {"model": {"kind": "torchvision", "name": "swin_t", "weights": None, "options": {"depths": {"a": [-1e300]}}}},
    ],
    ids=str,
)
def test_a_description_beyond_its_bounds_cannot_be_read(changes: dict[str, Any], run: Path) -> None:
    _described(run, **changes)
    _refused(run, r"model\.json cannot be read: ")


def test_a_million_classes_are_not_built_for_a_few_weights(run: Path) -> None:
    _described(run, num_classes=1 << 20, model={"kind": "small_cnn", "width": 1024})
    _refused(run, "describes another network")


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"kind": "timm", "name": "hf-hub:nobody/nothing", "pretrained": False}, "hf-hub:nobody/nothing"),
        ({"kind": "timm", "name": "local-dir:/tmp", "pretrained": False}, "local-dir:/tmp"),
        ({"kind": "timm", "name": TINY_TIMM, "options": {"checkpoint_path": "w.pt"}}, "checkpoint_path"),
        ({"kind": "timm", "name": "test_vit", "options": {"depth": 10**6}}, "depth=1000000"),
        ({"kind": "timm", "name": "test_vit", "options": {"img_size": 10**6}}, "img_size"),
        ({"kind": "torchvision", "name": "swin_t", "weights": None, "options": {"depths": [10**6]}}, "depths"),
        ({"kind": "small_cnn", "width": 10**9}, "width 1000000000"),
        ({"kind": "small_cnn", "depth": 10**9}, "depth 1000000000"),
    ],
    ids=str,
)
def test_what_only_a_user_may_name_needs_a_grant(model: dict[str, Any], named: str, run: Path) -> None:
    _described(run, model=model)
    _refused(run, re.escape(named), RefusedError)


def _granted(run: Path, error: LogitCacheError) -> None:
    """Carry out each fix that a refusal prints."""
    variable = re.search(r"set (\w+)=([0-9a-f]{64})", str(error))
    key = re.search(r"in a recipe: trust: ([0-9a-f]{64})", str(error))
    assert variable is not None
    assert key is not None
    assert f"--trust {key[1]}" in str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*variable.groups())
        load_model(run)
    Run.model_validate({"path": str(run), "trust": key[1]}).build(3, 3)


def test_a_grant_lets_a_model_be_built_within_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = saved_run(tmp_path / "run", Timm(name="vit_tiny_patch16_224", options=SMALL_VIT, pretrained=False), 3, 3)
    assert weights_digest(load_model(tmp_path / "run").module) == weights_digest(module)  # this user wrote it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    _granted(tmp_path / "run", _refused(tmp_path / "run", "embed_dim=16", RefusedError))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _sparse(path: Path) -> None:
    os.truncate(path, 1 << 42)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
@pytest.mark.parametrize("change", [_fifo, _endless, _link, _sparse])
def test_only_regular_files_of_a_bounded_size_are_read(change: Callable[[Path], None], name: str, run: Path) -> None:
    change(run / name)
    _refused(run, f"{re.escape(name)} cannot be read: it (is|has)")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 500_000, b'{"model": ' * 100_000, b"null"])
def test_what_is_no_description_is_refused(content: bytes, run: Path) -> None:
    (run / "model.json").write_bytes(content)
    _refused(run, r"model\.json cannot be read")


def _header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, _header(1 << 60, b"{}"), _header(2, b"[]"), _header(4, b"{}{}"), _header(3000, b"[" * 3000)],
)
def test_weights_without_a_sound_header_are_refused(content: bytes, run: Path) -> None:
    (run / "weights.safetensors").write_bytes(content)
    _refused(run, r"weights\.safetensors cannot be read")


def test_a_file_of_far_more_weights_is_not_read(run: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}
    header = json.dumps({"more": entry}).encode()
    (run / "weights.safetensors").write_bytes(_header(len(header), header))
    os.truncate(run / "weights.safetensors", 8 + len(header) + (1 << 32))
    started, before = time.process_time(), _peak()
    with pytest.raises(RecipeError, match="its network takes"):
        load_model(run)
    assert time.process_time() - started < 2
    assert _peak() - before < 300 << 10


@pytest.mark.parametrize("cast", [torch.Tensor.int, torch.Tensor.byte, torch.Tensor.bool])
def test_weights_that_were_cast_to_integers_are_refused(cast: Any, run: Path) -> None:
    state = load_file(run / "weights.safetensors")
    save_file({name: cast(value) for name, value in state.items()}, run / "weights.safetensors")
    with pytest.raises(RecipeError, match="is integer, not floating-point"):
        load_model(run)


@pytest.mark.parametrize(
    "model",
    [
        SmallCNN(width=3, depth=3),
        Torchvision(name="regnet_y_400mf", weights=None),
        Torchvision(name="swin_t", weights=None),
        Timm(name="test_vit", pretrained=False),
        Timm(name="test_maxvit", pretrained=False),
    ],
    ids=lambda model: getattr(model, "name", "small_cnn"),
)
def test_an_honest_run_is_built_and_draws_nothing(model: Any, tmp_path: Path) -> None:
    if isinstance(model, Timm) and not timm.is_model(model.name):
        pytest.skip(f"timm {timm.__version__} has no {model.name}")
    module = saved_run(tmp_path / "run", model, 5, 3)
    torch.manual_seed(1)
    model.build(5, 3)
    wanted = torch.get_rng_state()
    torch.manual_seed(1)
    built = load_model(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), wanted)  # building once, as training does
    assert weights_digest(built.module) == weights_digest(module)
    assert not any(np.isnan(value.numpy()).any() for value in built.module.state_dict().values())
