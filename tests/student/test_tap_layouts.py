"""Taps of a student that put channels last are compared as those that put them first."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from logitcache.errors import MismatchError, RecipeError
from logitcache.student import build_model
from logitcache.student.losses import Hint
from logitcache.student.losses.base import Site
from logitcache.student.training import train
from logitcache.student.training_data import open_training_data
from tests.student.featured import fill_featured
from tests.student.small import student


class Turned(nn.Module):
    """Puts out maps [H, W, C] at `turn`, of as many channels as places a side if that is asked for; takes one size."""

    def __init__(self, channels: int, side: int, one_size: bool) -> None:
        super().__init__()
        self.conv, self.turn = nn.Conv2d(1, channels, 1), nn.Identity()
        self.fc, self.side = nn.Linear(channels, 10), side if one_size else None

    def forward(self, images: Tensor) -> Tensor:
        assert self.side in (None, images.shape[-1]), "another size"
        maps: Tensor = self.turn(self.conv(images).permute(0, 2, 3, 1))
        return self.fc(maps.mean(dim=(1, 2)))  # type: ignore[no-any-return]


def turned(channels: int = 5, side: int = 28, one_size: bool = False) -> nn.Module:
    return Turned(channels, side, one_size)


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_featured(tmp_path_factory.mktemp("featured") / "c")


def shapes(featured: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes that losses are given, as training would."""
    found: list[Site] = []
    entry = student(
        out,
        featured,
        losses=[{"kind": "hint", "student": "turn", "feature": "maps"}],
        model={"kind": "custom", "factory": "tests.student.test_tap_layouts:turned", **changes.pop("model", {})},
        **changes,
    )
    found_lesson = open_training_data(entry).lesson(entry)
    classifier = build_model.build_classifier(entry, found_lesson, None)
    monkeypatch.setattr(Hint, "adapter", lambda loss, site: found.append(site) or nn.Identity())
    build_model.build_adapters(entry, found_lesson, classifier)
    return dict(found[0].taps)


def test_channels_last_are_found(featured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shapes(featured, tmp_path / "run", monkeypatch)["turn"]
    assert shape[0] == 5
    assert shape[1] == shape[2]


def test_what_nothing_decides_is_refused_and_its_fix_works(
    featured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = shapes(featured, tmp_path / "run", monkeypatch)["turn"][1]
    model = {"arguments": {"channels": side, "side": side, "one_size": True}}
    with pytest.raises(RecipeError, match=r"the model: the tap 'turn'.*the axis of the channels is not known"):
        shapes(featured, tmp_path / "run", monkeypatch, model=model)
    given = shapes(featured, tmp_path / "run", monkeypatch, model=model, tap_layouts={"turn": "channels_last"})
    assert given["turn"] == (side, side, side)


def test_features_reach_the_loss_with_channels_first(featured: Path, tmp_path: Path) -> None:
    from logitcache.models.taps.taps import Tapped

    net = Turned(5, 6, one_size=False)
    _, found = Tapped(net, net, ["turn"], "the model", {"turn": "channels_last"})(torch.rand(2, 1, 6, 6))
    assert found["turn"].shape == (2, 5, 6, 6)


def test_a_run_of_before_layouts_resumes_by_the_fix_that_its_error_names(
    featured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases that knew no layouts read [H, W, C] as [C, H, W]: their runs have adapters of other shapes."""
    changes: dict[str, Any] = {
        "losses": [{"kind": "cross_entropy"}, {"kind": "hint", "student": "turn", "feature": "maps"}],
        "model": {"kind": "custom", "factory": "tests.student.test_tap_layouts:turned"},
    }
    begun = student(tmp_path / "run", featured, epochs=1, **changes)
    with monkeypatch.context() as before:
        before.setattr("logitcache.student.training.decide_layouts", lambda *_: {"turn": "auto"})
        train(begun)
    longer = student(tmp_path / "run", featured, epochs=2, **changes)
    with pytest.raises(MismatchError) as refused:
        train(longer, resume=True)
    (fix,) = re.findall(r"tap_layouts: (\{.*?\})", str(refused.value))
    layouts = yaml.safe_load(fix)
    assert layouts == {"turn": "channels_first"}
    resumed = student(tmp_path / "run", featured, epochs=2, tap_layouts=layouts, **changes)
    assert train(resumed, resume=True).epochs == 2
