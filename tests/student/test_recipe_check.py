"""`recipe check` on a student and its cache: what training would refuse, without an image and without weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.config.recipe import dump_recipe
from logitcache.errors import LogitCacheError
from logitcache.report.recipe_check import check_recipes
from logitcache.runtime import console
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.views.datasets import bundled
from tests.student.featured import LOSSES, MAPS, fill_featured
from tests.student.small import LINEAR, PartlyLabelled, recipe, student


class Unused(nn.Module):
    """A layer that no pass runs, and one that every pass runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU()
        self.never, self.head = nn.Identity(), nn.Linear(8, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.twice(self.twice(self.stem(pixels))).mean(dim=(2, 3)))
        return logits


class InColour(PartlyLabelled):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image.expand(3, -1, -1), label


IN_COLOUR = {"kind": "custom", "factory": "tests.student.test_recipe_check:InColour"}
UNUSED = {"kind": "custom", "factory": "tests.student.test_recipe_check:Unused"}
RESNET = {"kind": "torchvision", "name": "resnet18", "weights": "DEFAULT"}
HINT = {"kind": "hint", "feature": "maps"}


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_featured(tmp_path_factory.mktemp("checked") / "cache")


def _check(tmp_path: Path, cache: Path, **changes: Any) -> str | None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(student(tmp_path / "run", cache, **changes)))
    before = torch.get_rng_state()
    (checked,) = check_recipes([file])
    assert torch.equal(torch.get_rng_state(), before)
    assert checked.command == "train-student"
    assert not (tmp_path / "run").exists()
    return checked.error


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such tap": (
        {"losses": [{"kind": "cross_entropy"}, {**HINT, "student": "0.body"}]},
        "the model has no module '0.body'.\n  Did you mean",
    ),
    "a tap that does not fire": (
        {"model": UNUSED, "losses": [{**HINT, "student": "never"}]},
        "the model: the tap 'never' did not fire in a pass. Fix: tap a module that runs once",
    ),
    "a tap that fires twice": (
        {"model": UNUSED, "losses": [{**HINT, "student": "twice"}]},
        "the model: the tap 'twice' fired 2 times in a pass",
    ),
    "a tap to evaluate": (
        {"validation": {"dataset": {"kind": "bundled", "split": "test"}, "taps": ["0", "head"]}},
        "the model has no module 'head'",
    ),
    "features that cannot be compared": (
        {"losses": [{"kind": "attention_transfer", "student": "3:input", "feature": "maps"}]},
        "losses.0 (attention_transfer): a feature of shape [8] has no places",
    ),
    "another number of classes": (
        {"model": LINEAR | {"arguments": {"num_classes": 7}}},
        "the model predicts 7 classes, what it learns from has 10",
    ),
    "images of another size": (
        {"model": LINEAR | {"arguments": {"size": 32}}},
        "the model cannot take the images, uint8 [1, 28, 28]",
    ),
    "a last batch of one": (
        {"losses": [{"kind": "rkd", **MAPS}], "batch_size": 199},
        "losses.0 (rkd) takes 3 or more\n  Fix: drop_last: true",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_training_would_refuse_is_told(
    case: str, featured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, expected = WRONG[case]
    with monkeypatch.context() as patch:
        patch.setattr(bundled.Bundled, "open", _no_images)
        error = _check(tmp_path, featured, **changes)
    assert error is not None
    assert expected in error
    if "validation" not in changes:
        with pytest.raises(LogitCacheError) as refused:
            train(student(tmp_path / "run", featured, **changes))
        assert str(refused.value) == error


def _no_images(self: object) -> object:
    raise AssertionError("a check opens no images")


def test_what_training_would_take_is_valid(featured: Path, tmp_path: Path) -> None:
    assert _check(tmp_path, featured, losses=LOSSES) is None
    assert _check(tmp_path, featured, model=UNUSED, losses=[{**HINT, "student": "stem"}]) is None


def test_a_cache_that_is_not_there_is_not_asked(tmp_path: Path) -> None:
    assert _check(tmp_path, tmp_path / "none", losses=[{**HINT, "student": "nowhere"}]) is None


def test_weights_are_not_loaded_and_the_taps_of_their_network_are_looked_for(
    tmp_path: Path, caches: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would say at which size the network runs: whether it can take the images is for training to see."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _no_images)
    features = {"maps": {"kind": "maps", "tap": "0"}}
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3}
    entry = {"preprocessing": preprocessing, "logits": {"kind": "dense"}, "features": features}
    entries = {"dataset": IN_COLOUR, "teachers": {"net": entry}, "num_workers": 0, "device": "cpu"}
    colours = caches / "colours"
    precompute(recipe(PrecomputeRecipe, cache=str(colours), **entries), teachers={"net": network})
    console.configure()
    assert _check(tmp_path, colours, model=RESNET, losses=[{**HINT, "student": "layer1"}]) is None
    assert "the model's weights are not loaded here" in capfd.readouterr().err
    console.configure(quiet=True)
    missing = _check(tmp_path, colours, model=RESNET, losses=[{**HINT, "student": "layer5"}])
    assert missing is not None
    assert "the model has no module 'layer5'.\n  Did you mean" in missing
    tapped = {"model": RESNET, "losses": [{**HINT, "student": "layer1"}]}
    assert _check(tmp_path, colours, preprocessing=preprocessing, **tapped) is None
