"""Preprocessing: the pixels a network gets, and who says so."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.transforms import v2

from logitcache.errors import RecipeError
from logitcache.models import (
    BuiltModel,
    Classifier,
    Preprocessing,
    resolve_preprocessing,
)
from tests.models.nets import GREY, RGB


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_that_of_torchvision(channels: int) -> None:
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    pixels = torch.randint(0, 256, (4, channels, 9, 7), dtype=torch.uint8)
    before = pixels.clone()
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    classifier = Classifier(nn.Identity(), Preprocessing(mean=mean, std=std))
    torch.testing.assert_close(classifier.normalize(pixels), reference(pixels), rtol=0, atol=1e-6)
    assert torch.equal(pixels, before)


def test_pixels_of_another_size_are_resized_with_antialiasing() -> None:
    pixels = torch.randint(0, 256, (2, 1, 64, 48), dtype=torch.uint8)
    preprocessing = Preprocessing(mean=(0.0,), std=(1.0,), input_size=(16, 12))
    resized = Classifier(nn.Identity(), preprocessing).normalize(pixels)
    reference = v2.functional.resize(pixels.float() / 255, [16, 12], antialias=True)
    torch.testing.assert_close(resized, reference, rtol=0, atol=1e-5)


def test_pixels_of_the_models_size_are_not_touched() -> None:
    pixels = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    preprocessing = Preprocessing(mean=(0.0,), std=(1.0,), input_size=8)
    normalized = Classifier(nn.Identity(), preprocessing).normalize(pixels)
    assert torch.equal(normalized, pixels.float() / 255)


def test_images_with_other_channels_are_refused_with_the_fix() -> None:
    with pytest.raises(RecipeError, match=r"1 channels.*\n.*mode: RGB"):
        Classifier(nn.Identity(), RGB)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(RecipeError, match=r"3 channels.*\n.*mode: L"):
        Classifier(nn.Identity(), GREY)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("pixels", [torch.zeros(2, 1, 8, 8), torch.zeros(1, 8, 8).byte()])
def test_pixels_that_are_no_uint8_batch_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(RecipeError, match="uint8 pixels"):
        Classifier(nn.Identity(), GREY)(pixels)


def test_a_model_that_returns_no_logits_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"returned \[2, 1, 8, 8\]"):
        Classifier(nn.Identity(), GREY)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": (0.5,), "std": (0.5, 0.5)},
        {"mean": (), "std": ()},
        {"mean": (123.7,), "std": (58.4,)},
        {"mean": (0.5,), "std": (0.0,)},
        {"mean": (0.5,), "std": (0.5,), "input_size": 0},
    ],
)
def test_a_senseless_preprocessing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(**fields)


def test_what_the_recipe_says_wins_then_the_source_then_the_default() -> None:
    mine = Preprocessing(mean=(0.1,), std=(0.2,))
    source = Preprocessing(mean=(0.3,), std=(0.4,))
    knows, silent = BuiltModel(nn.Identity(), source), BuiltModel(nn.Identity(), None)
    assert resolve_preprocessing(knows, mine, who="student", default=GREY) == mine
    assert resolve_preprocessing(knows, None, who="student", default=GREY) == source
    assert resolve_preprocessing(silent, None, who="student", default=GREY) == GREY
    with pytest.raises(RecipeError, match=r"teachers\.a .*\n.*teachers\.a\.preprocessing"):
        resolve_preprocessing(silent, None, who="teachers.a")


def test_mean_and_std_are_no_part_of_the_weights() -> None:
    module = nn.Linear(2, 2)
    assert set(Classifier(module, GREY).state_dict()) == {"module.weight", "module.bias"}
