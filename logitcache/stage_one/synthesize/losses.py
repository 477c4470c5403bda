"""Losses of DeepInversion: Yin et al., "Dreaming to Distill" (CVPR 2020, arXiv:1912.08795). All return a scalar."""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Steps (down, right) to the neighbours of a pixel: total variation takes each pair of neighbours once."""


def batch_norm_loss(inputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Compare the statistics of the input [B, C, ...] of a BatchNorm with its running `mean` and `variance` [C].

    Equation 4 of the paper: the L2 norm of the differences of the means, plus that of the variances, of the batch as
    training takes them (biased, over all axes but the channels).
    """
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    found, centre = torch.var_mean(inputs, axes, correction=0)
    loss: Tensor = torch.linalg.vector_norm(centre - mean) + torch.linalg.vector_norm(found - variance)
    return loss


def differences(images: Tensor) -> list[Tensor]:
    """Return the differences between neighbours of images [B, C, H, W] along both sides and both diagonals."""
    height, width = images.shape[2:]
    found = []
    for down, right in NEIGHBOURS:
        later = images[..., down:, max(0, right) : width + min(0, right)]
        found.append(later - images[..., : height - down, max(0, -right) : width - max(0, right)])
    return found


def total_variation_l1(images: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbours, summed over the four directions, of [B, C, H, W]."""
    return torch.stack([one.abs().mean() for one in differences(images) if one.numel()]).sum()


def total_variation_l2(images: Tensor) -> Tensor:
    """Return the L2 norm of each image's differences, summed over the four directions; the mean over [B, C, H, W]."""
    return torch.stack([torch.linalg.vector_norm(one, dim=(1, 2, 3)).mean() for one in differences(images)]).sum()


def l2_norm(images: Tensor) -> Tensor:
    """Return the mean L2 norm of images [B, C, H, W]."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms.mean()


def diversity_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cosine similarity of the features [B, D] of pairs of images of one class; 0 without a pair.

    After the diversity term of Olah et al., "Feature Visualization" (Distill 2017): the negative pairwise cosine
    similarity is what is maximised there, of Gram matrices. labels: int64 [B].
    """
    directions = functional.normalize(features)
    alike = torch.triu(labels[:, None] == labels, diagonal=1)
    return (directions @ directions.T)[alike].sum() / alike.sum().clamp(min=1)


def competition_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return 1 - the Jensen-Shannon divergence, in nats, of the softmax of two logits [B, K]; the mean over images.

    Equation 8 of the paper: low where teacher and student disagree.
    """
    first, second = functional.log_softmax(teacher, 1), functional.log_softmax(student, 1)
    middle = torch.logaddexp(first, second) - math.log(2)
    halves = [functional.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (first, second)]
    return 1 - (halves[0] + halves[1]) / 2


class Statistics(NamedTuple):
    """What the BatchNorm layers of a network said of one batch: their losses, in order; features [B, D] of the last."""

    losses: list[Tensor]
    features: Tensor


class BatchNormInputs:
    """Compare the input of every BatchNorm of a network, in evaluation mode, with its running statistics.

    A context manager: hooks are on the network within the block.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [layer for layer in network.modules() if has_statistics(layer)]
        self._losses: list[Tensor] = []
        self._last: tuple[Any, Tensor] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_pre_hook(self._compare) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Statistics:
        """Return what the layers said since the last call.

        Features are the last layer's input, its mean over positions, standardised by the running statistics.
        """
        assert self._last is not None, "no BatchNorm took part in the pass"
        layer, inputs = self._last
        pooled = inputs.flatten(2).mean(2) if inputs.ndim > 2 else inputs
        features = (pooled - layer.running_mean) / torch.sqrt(layer.running_var + layer.eps)
        losses, self._losses, self._last = self._losses, [], None
        return Statistics(losses, features)

    def _compare(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        self._losses.append(batch_norm_loss(inputs[0], layer.running_mean, layer.running_var))
        self._last = layer, inputs[0]


def has_statistics(layer: nn.Module) -> bool:
    """Whether a layer is a BatchNorm with running statistics."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None
