"""How students compute by default: a rule that times nothing, is recorded, and that a run goes on by."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from logitcache.classifier import Classifier
from logitcache.errors import MismatchError
from logitcache.models import SmallCNN
from logitcache.student.learner import Learner
from logitcache.student.speed import without_auto
from logitcache.student.training import train
from logitcache.views.resident import ResidentViews
from tests.student.small import GREY, TINY, flat, metrics, student, weights

OFF = {"channels_last": False, "fused": False}


class Viewing(nn.Module):
    """A convolution whose output is flattened by `view`, which channels-last maps do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, stride=9, padding=1), nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.conv(pixels).view(len(pixels), -1))


class Striding(Viewing):
    """One that reads its maps in the order of memory: channels-last gives other answers, and no error."""

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.conv(pixels)
        return self.head(torch.as_strided(maps, (len(pixels), 32), (32, 1)))


def chosen(module: nn.Module, device: str, **changes: Any) -> tuple[object, object]:
    recipe = student(Path("out"), Path("cache"), **changes)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    found = without_auto(recipe, Classifier(module, GREY), images, torch.device(device))
    assert found.model_copy(update={key: getattr(recipe, key) for key in OFF}) == recipe
    return found.channels_last, found.fused


@pytest.mark.parametrize(
    ("module", "device", "precision", "wanted"),
    [
        ("cnn", "cpu", "float32", (True, True)),
        ("cnn", "cpu", "bfloat16", (True, True)),
        ("flat", "cpu", "float32", (False, True)),
        ("viewing", "cpu", "float32", (False, True)),
        ("striding", "cpu", "float32", (False, True)),
        ("cnn", "cuda", "float32", (False, True)),
        ("cnn", "cuda", "float16", (True, True)),
        ("cnn", "mps", "float16", (False, False)),
    ],
)
def test_the_rule(module: str, device: str, precision: str, wanted: tuple[bool, bool]) -> None:
    made = {
        "cnn": lambda: SmallCNN(width=4).build(10, 1).module,
        "flat": flat,
        "viewing": Viewing,
        "striding": Striding,
    }
    assert chosen(made[module](), device, precision=precision) == wanted
    assert chosen(made[module](), device, precision=precision, **OFF) == (False, False)
    assert chosen(made[module](), device, precision=precision, channels_last=True, fused=True) == (True, True)


def test_complex_parameters_have_no_fused_step() -> None:
    module = flat()
    module.register_parameter("phase", nn.Parameter(torch.zeros(1, dtype=torch.complex64)))
    assert chosen(module, "cpu") == (False, False)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, object]]:
    """Note of each learner whether its convolutions are channels-last, and its optimiser's `fused`."""
    seen: list[tuple[bool, object]] = []
    build = Learner.__init__

    def noting(self: Learner, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        convolutions = [
            one.weight for one in self.model.modules() if isinstance(one, nn.Conv2d) and one.in_channels > 1
        ]
        last = {one.is_contiguous(memory_format=torch.channels_last) for one in convolutions}
        seen.append((last == {True}, self.optimizer.defaults["fused"]))

    monkeypatch.setattr(Learner, "__init__", noting)
    return seen


def test_auto_is_what_it_records_and_computes_about_the_same_as_off(
    cache: Path, tmp_path: Path, formats: list[tuple[bool, object]]
) -> None:
    changes = {"epochs": 1, "optimizer": {"kind": "sgd", "lr": 0.05}}
    auto = train(student(tmp_path / "auto", cache, **changes))
    stated = train(student(tmp_path / "stated", cache, channels_last=True, fused=True, **changes))
    off = train(student(tmp_path / "off", cache, **OFF, **changes))
    assert formats == [(True, True), (True, True), (False, None)]
    assert weights(auto) == weights(stated) != weights(off)
    assert auto.loss == pytest.approx(off.loss, rel=1e-4)
    for name, wanted in {"auto": True, "off": False}.items():
        recorded = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())
        assert (recorded["channels_last"], recorded["fused"]) == (wanted, wanted)


def test_a_run_of_a_release_without_the_keys_goes_on_as_it_was(cache: Path, tmp_path: Path) -> None:
    for name in ("whole", "old"):
        epochs = 2 if name == "whole" else 1
        train(student(tmp_path / name, cache, **OFF, epochs=epochs, schedule={"final_lr": 1.0}))
    path = tmp_path / "old" / "recipe.yaml"
    recorded = yaml.safe_load(path.read_text())
    assert recorded.pop("fused") is False  # `channels_last` was a key before, and always recorded
    path.write_text(yaml.safe_dump(recorded, sort_keys=False))
    train(student(tmp_path / "old", cache, epochs=2, schedule={"final_lr": 1.0}), resume=True)
    assert weights(tmp_path / "old") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "old") == metrics(tmp_path / "whole")


def test_a_run_goes_on_by_what_it_recorded_and_refuses_another_choice(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(student(out, cache, epochs=1, channels_last=False, fused=True))
    with pytest.raises(MismatchError, match="channels_last: the run has False, the recipe True"):
        train(student(out, cache, channels_last=True), resume=True)
    train(student(out, cache, model=TINY), resume=True)
    recorded = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recorded["epochs"], recorded["channels_last"], recorded["fused"]) == (2, False, True)


def test_views_that_are_rendered_on_the_device_change_no_byte(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(student(tmp_path / "workers", cache, num_workers=0))
    places: list[str] = []
    held = ResidentViews._hold

    def holding(self: ResidentViews, indices: list[int]) -> None:
        places.append(self.device.type)
        held(self, indices)

    monkeypatch.setattr(ResidentViews, "_hold", holding)
    found = train(student(tmp_path / "resident", cache, num_workers="auto"))
    assert set(places) == {"cpu"}
    assert weights(found) == weights(wanted)
    assert metrics(tmp_path / "resident") == metrics(tmp_path / "workers")
