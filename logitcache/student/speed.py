"""How a student computes, if its recipe leaves that open: by a rule of model, device and precision.

Nothing is timed, so a run that is repeated computes the same bits. A run records the choice, and goes on by it.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from logitcache.classifier import Classifier
from logitcache.models.variants import has_convolutions
from logitcache.student.training_recipes import TrainingRecipe

R = TypeVar("R", bound=TrainingRecipe)
M = TypeVar("M", bound=nn.Module)

CHOSEN = ("channels_last", "fused")
"""The keys of a recipe that `auto` leaves open."""

_FUSED = ("cpu", "cuda")
_BOUND = 1e-3
"""Largest difference of two answers that rounding explains, as a share of the largest answer."""


def without_auto(recipe: R, classifier: Classifier, images: Tensor, device: torch.device) -> R:
    """Return a recipe without `auto` for a model that learns on a device from such images, uint8 [B, C, H, W].

    Channels-last pays for 2-D convolutions on a CPU, and on CUDA under autocast, for which tensor cores take it. Fused
    kernels are those that torch has for the parameters' type.
    """
    chosen = {}
    if recipe.channels_last == "auto":
        pays = device.type == "cpu" or (device.type == "cuda" and recipe.precision != "float32")
        chosen["channels_last"] = pays and has_convolutions(classifier) and _is_same(classifier, images)
    if recipe.fused == "auto":
        is_real = not any(parameter.is_complex() for parameter in classifier.parameters())
        chosen["fused"] = device.type in _FUSED and is_real
    return recipe.model_copy(update=chosen)


def as_recorded(recipe: R, recorded: TrainingRecipe) -> R:
    """Return a recipe in which `auto` is what a run records; one of a release without the key computed plainly."""
    found = {key: getattr(recorded, key) is True for key in CHOSEN if getattr(recipe, key) == "auto"}
    return recipe.model_copy(update=found)


def lay_out(module: M, recipe: TrainingRecipe) -> M:
    """Lay a module's weights out in memory as a recipe without `auto` says, in place; returns it."""
    return module.to(memory_format=torch.channels_last) if recipe.channels_last is True else module


@torch.no_grad()
def _is_same(classifier: Classifier, images: Tensor) -> bool:
    """Return whether a model answers noise as before once it is channels-last.

    A module may take its input's memory for granted, as `view` does.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=generator).to(images.device)
    plain = classifier.eval()(noise)
    try:
        found = copy.deepcopy(classifier).to(memory_format=torch.channels_last)(noise)
    except Exception:  # the model's own code may raise anything
        return False
    return bool((found - plain).abs().max() <= _BOUND * plain.abs().max())
