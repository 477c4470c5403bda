"""What Grad-CAM maps are made of, from a pass of its own.

With gradients, attention layers take other paths than without, and answer with other last bits. What else is kept of a
teacher comes from a pass without, so that its bytes do not depend on whether a cache has Grad-CAM maps, too.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.models import Classifier
from logitcache.models.taps import Tapped
from logitcache.views.datasets.images.labels import single_labels


class Graded(NamedTuple):
    """What a tap holds, [B, ...], and the gradient of the logit of each image's class there, float32 [B, ...]."""

    values: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class GradedPass:
    """A pass of a classifier with gradients; `who` names it in errors."""

    classifier: Classifier
    taps: tuple[str, ...]
    who: str

    def __call__(self, pixels: Tensor, labels: Tensor, logits: Tensor) -> dict[str, Graded]:
        """Answer uint8 pixels [B, C, H, W] and return, by tap, what speaks for each image's class.

        labels: int64 [B], -1 where there is none, or multi-hot [B, C]. logits: [B, K], what was answered without
        gradients: it decides the class if the label names none. Raises as `Tapped` does.
        """
        if not self.taps:
            return {}
        network = self.classifier.module
        tapped = Tapped(network, network, self.taps, self.who)
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            hooks.callback(tapped.remove)
            # Networks may change their input in place, which no leaf allows.
            inputs = self.classifier.normalize(pixels).requires_grad_().clone()
            output, values = tapped(inputs)
            # A row's logit depends on that row alone: the gradient of the sum is each row's own.
            chosen = self.classifier.checked(output).float().gather(1, classes_of(labels, logits)[:, None]).sum()
            found = torch.autograd.grad(chosen, [values[tap] for tap in self.taps], allow_unused=True)
        return {tap: Graded(values[tap].detach(), self._known(tap, g)) for tap, g in zip(self.taps, found, strict=True)}

    def _known(self, tap: str, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise RecipeError(f"{self.who}: the logits do not depend on {tap!r}. Fix: tap another module")
        return gradient.float()


def classes_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the class that each image's label names, else that of the answer, int64 [B]."""
    named = single_labels(labels)
    return torch.where((named >= 0) & (named < logits.shape[1]), named, logits.argmax(dim=1))
