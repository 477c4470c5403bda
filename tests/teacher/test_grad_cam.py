"""Grad-CAM maps change nothing of what is kept beside them, down to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.config.recipe import dump_recipe
from logitcache.report.verify_and_repair import repair
from logitcache.stage_one.precompute import precompute
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from tests.cache.made import contents, flip, recipe, run, shard_files
from tests.teacher.nets import Net, attentive, images, keeping

BLOCK = "encoder.layers.encoder_layer_0"
CAM = {"cam": {"kind": "grad_cam", "tap": BLOCK, "dtype": "float32", "storage": "packed"}}
TOKENS = {"tokens": {"kind": "maps", "tap": BLOCK, "dtype": "int8", "storage": "packed"}}
LOGITS = {"kind": "packed_top_k", "k": 2}
MODEL = {"kind": "custom", "factory": "tests.teacher.nets:attentive"}
IMAGES = {"kind": "custom", "factory": "tests.teacher.nets:images"}


def plan(cache: Path, features: dict[str, Any]) -> PrecomputeRecipe:
    entry = keeping(LOGITS, TOKENS | features) | {"model": MODEL}
    return recipe(cache, dataset=IMAGES, views={"num_views": 1}, teachers={"t": entry}, shard_rows=32, batch_size=16)


def arrays(cache: Path) -> dict[str, bytes]:
    """Return the shards and commit records of what is kept beside Grad-CAM maps."""
    kept = {name: data for name, data in contents(cache).items() if name.startswith(("t.logits", "t.tokens"))}
    return {name: data for name, data in kept.items() if "/c." in name}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    precompute(plan(tmp_path / "plain", {}))
    return tmp_path / "plain"


def test_this_teacher_answers_otherwise_with_gradients() -> None:
    """Else the tests below would tell nothing."""
    network = attentive().eval().requires_grad_(False)
    pixels = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = network(pixels)
    assert not torch.equal(without, network(pixels.requires_grad_()).detach())


def test_what_is_kept_beside_maps_is_the_same_without_them(plain: Path, tmp_path: Path) -> None:
    precompute(plan(tmp_path / "both", CAM))
    assert arrays(tmp_path / "both") == arrays(plain)


def test_what_is_damaged_after_maps_were_added_comes_back(plain: Path, tmp_path: Path) -> None:
    damaged = ("t.logits.errors", "t.tokens.errors", "t.logits.fall")
    before = arrays(plain)
    precompute(plan(plain, CAM))
    grown = contents(plain)
    for name in damaged:
        flip(shard_files(plain, name)[1], 9)
    precompute(plan(plain, CAM))
    assert contents(plain) == grown
    for name in damaged:
        flip(shard_files(plain, name)[0], 9)
    (tmp_path / "r.yaml").write_text(dump_recipe(plan(plain, CAM)))
    assert repair(plain, tmp_path / "r.yaml").problems == ()
    assert contents(plain) == grown
    assert arrays(plain) == before


def test_a_network_that_changes_its_input_answers_the_same(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, pixels: Tensor) -> Tensor:
            answers: Tensor = self.inner(pixels.mul_(2.0))
            return answers

    for name, features in (("a", {}), ("b", {"cam": CAM["cam"] | {"tap": "inner.relu"}})):
        run(tmp_path / name, images(), InPlace(), teachers={"t": keeping(None, features)}, shard_rows=512)
    assert arrays(tmp_path / "a") == arrays(tmp_path / "b")
