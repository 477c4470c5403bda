"""Values at taps and their gradients, of which Grad-CAM maps are made, from a forward and backward pass of their own.

With gradients, attention layers take other paths than without, and differ in the last bits. All other targets come from
a pass without gradients, so that their bytes do not depend on whether a cache has Grad-CAM maps, too.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.models import Classifier
from logitcache.models.taps.taps import Tapped
from logitcache.views.datasets.images.labels import single_labels


class Graded(NamedTuple):
    """The values at a tap, [B, ...], and the gradient of the logit of each image's class there, float32 [B, ...]."""

    values: Tensor
    gradient: Tensor


def tap_gradients(
    classifier: Classifier, taps: Sequence[str], who: str, pixels: Tensor, labels: Tensor, logits: Tensor
) -> dict[str, Graded]:
    """Run uint8 pixels [B, C, H, W] through a classifier and return the values and gradients at its taps.

    labels: int64 [B], -1 where there is none, or multi-hot [B, C]. logits: [B, K], as answered without gradients: they
    decide the class if the label names none. `who` names the classifier in errors. Raises as `Tapped` does, and
    RecipeError for a tap that the logits do not depend on.
    """
    network = classifier.module
    with contextlib.closing(Tapped(network, network, taps, who)) as tapped, torch.enable_grad():
        # Networks may change their input in place, which no leaf allows.
        inputs = classifier.normalize(pixels).requires_grad_().clone()
        output, values = tapped(inputs)
        # A row's logit depends on that row alone: the gradient of the sum is each row's own.
        chosen = classifier.checked(output).float().gather(1, classes_of(labels, logits)[:, None]).sum()
        gradients = torch.autograd.grad(chosen, [values[tap] for tap in taps], allow_unused=True)
    found = {}
    for tap, gradient in zip(taps, gradients, strict=True):
        if gradient is None:
            raise RecipeError(f"{who}: the logits do not depend on {tap!r}. Fix: tap another module")
        found[tap] = Graded(values[tap].detach(), gradient.float())
    return found


def classes_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the class that each image's label names, else that of the answer, int64 [B]."""
    named = single_labels(labels)
    return torch.where((named >= 0) & (named < logits.shape[1]), named, logits.argmax(dim=1))
