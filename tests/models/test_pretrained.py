"""Models of torchvision and timm, with and without their weights."""

import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import LogitCacheError, MissingExtraError, RecipeError
from logitcache.models import (
    Preprocessing,
    Timm,
    Torchvision,
)
from tests.models.nets import TINY_TIMM


def test_torchvision_names_are_corrected() -> None:
    with pytest.raises(RecipeError, match=r"did you mean.*resnet50"):
        Torchvision(name="resnet-50", weights=None).build(10, 3)
    with pytest.raises(RecipeError, match="IMAGENET1K_V2, DEFAULT"):
        Torchvision(name="resnet50", weights="V3").build(None, 3)


def test_torchvision_takes_rgb_alone() -> None:
    with pytest.raises(RecipeError, match="mode: RGB"):
        Torchvision(name="resnet18", weights=None).build(10, 1)


def test_options_reach_the_constructor_and_wrong_ones_are_refused() -> None:
    model = Torchvision(name="squeezenet1_1", weights=None, options={"dropout": 0.25})
    assert model.build(4, 3).module.classifier[0].p == 0.25  # type: ignore[index, union-attr]
    with pytest.raises(RecipeError, match=r"droput(.|\n)*options"):
        Torchvision(name="squeezenet1_1", weights=None, options={"droput": 0.1}).build(4, 3)
    with pytest.raises(RecipeError, match=r"blocks(.|\n)*options"):
        Timm(name=TINY_TIMM, pretrained=False, options={"blocks": 3}).build(4, 3)


def test_pretrained_weights_for_other_classes_are_refused_before_any_download() -> None:
    with pytest.raises(RecipeError, match="pretrained for 1000 classes, 37 are asked for"):
        Torchvision(name="resnet18", weights="DEFAULT").build(37, 3)
    with pytest.raises(RecipeError, match="pretrained for 1000 classes, 37 are asked for"):
        Timm(name=TINY_TIMM).build(37, 3)


def test_weights_name_their_classes_without_a_download() -> None:
    names = Torchvision(name="mobilenet_v3_small", weights="DEFAULT").class_names()
    assert names is not None
    assert (len(set(names)), names[0], names[713]) == (1000, "tench", "photocopier")
    assert Timm(name=TINY_TIMM).class_names() == names
    assert Timm(name="vit_base_patch16_224.augreg_in21k").class_names() is None
    with pytest.raises(RecipeError, match="no weights 'V3'"):
        Torchvision(name="resnet50", weights="V3").class_names()


@pytest.mark.parametrize(
    "model",
    [
        Torchvision(name="resnet50", weights=None),
        Timm(name=TINY_TIMM, pretrained=False),
        Timm(name="hf-hub:timm/resnet50.a1_in1k"),
    ],
)
def test_random_and_unlisted_weights_name_no_classes(model: Torchvision | Timm) -> None:
    assert model.class_names() is None


@pytest.mark.filterwarnings("ignore::UserWarning:huggingface_hub")
def test_weights_that_cannot_be_downloaded_say_what_to_do() -> None:
    with pytest.raises(LogitCacheError, match=r"resnet18 could not be had(.|\n)*/checkpoints"):
        Torchvision(name="resnet18", weights="DEFAULT").build(None, 3)
    with pytest.raises(LogitCacheError, match=r"could not be had(.|\n)*HF_HOME"):
        Timm(name=TINY_TIMM).build(None, 3)


@pytest.fixture
def resnet18_in_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answer for torchvision's download with weights made here; returns them."""
    state = Torchvision(name="resnet18", weights=None).build(1000, 3).module.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    return dict(state)


def test_pretrained_weights_bring_their_normalisation(resnet18_in_the_hub: Any) -> None:
    built = Torchvision(name="resnet18", weights="IMAGENET1K_V1").build(None, 3)
    assert built.preprocessing == Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=224)
    assert torch.equal(built.module.state_dict()["fc.weight"], resnet18_in_the_hub["fc.weight"])


def test_a_new_head_keeps_every_other_weight(resnet18_in_the_hub: Any) -> None:
    built = Torchvision(name="resnet18", weights="DEFAULT", new_head=True).build(37, 3)
    state = built.module.state_dict()
    assert state["fc.weight"].shape == (37, 512)
    same = {n for n in state if torch.equal(state[n], resnet18_in_the_hub[n])}
    assert set(state) - same == {"fc.weight", "fc.bias"}


def test_timm_names_are_corrected() -> None:
    with pytest.raises(RecipeError, match=r"did you mean.*resnet50"):
        Timm(name="resnet_50").build(10, 3)
    with pytest.raises(RecipeError, match=r"did you mean.*resnet50\.a1_in1k"):
        Timm(name="resnet50.a1_in1").build(10, 3)


def test_timm_reads_a_folder_and_puts_in_no_random_layer_unasked(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    trained = Timm(name=TINY_TIMM, pretrained=False).build(7, 3).module
    save_for_hf(trained, tmp_path / "t", safe_serialization=True)
    entry = Timm(name=f"local-dir:{tmp_path}/t")
    built = entry.build(None, 3)
    assert built.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(160, 160))
    state = built.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())
    assert entry.build(7, 3).module.state_dict().keys() == state.keys()
    with pytest.raises(RecipeError, match=r"pretrained for 7 classes, 5 are asked for(.|\n)*new_head"):
        entry.build(5, 3)
    assert Timm(name=entry.name, new_head=True).build(5, 3).module.num_classes == 5
    assert entry.architecture().build(5, 3).module.num_classes == 5


def test_timm_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'logitcache\[timm\]'"):
        Timm(name=TINY_TIMM).build(10, 3)


def test_timm_weights_bring_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    built = Timm(name=TINY_TIMM).build(None, 3)
    assert built.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(160, 160))
    assert Timm(name=TINY_TIMM).build(None, 1).preprocessing is None
    assert Timm(name=TINY_TIMM, pretrained=False).build(5, 3).preprocessing is None


def test_the_reason_of_a_failed_download_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(LogitCacheError, match="no route"):
        Torchvision(name="resnet18", weights="DEFAULT").build(None, 3)
