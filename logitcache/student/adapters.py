"""Adapters of features: bring a student's and a teacher's to the same places, and map channels."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from logitcache.logits import at_least_float32
from logitcache.reductions import FeatureShape, as_maps, attention, pooled, resized

Shape = tuple[int, ...]


class Matched(NamedTuple):
    """Features at the same P places, the channels last: [B, P, C] of the student and [B, P, D] of the teacher."""

    student: Tensor
    teacher: Tensor


def matched(student: Tensor, teacher: Tensor) -> Matched:
    """Bring a student's features to the places of a teacher's, each maps [B, C, H, W], tokens [B, N, C] or vectors.

    Beside vectors, the student is pooled. As many tokens go token by token. Else both are maps, tokens without their
    class token, and the student's are brought to the teacher's size. Raises RecipeError for vectors beside places, and
    for tokens that are no square.
    """
    if teacher.ndim == 2:
        return Matched(pooled(student)[:, None], teacher[:, None])
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return Matched(student, teacher)
    wanted = as_maps(teacher)
    given = resized(as_maps(student), (wanted.shape[2], wanted.shape[3]))
    return Matched(given.flatten(2).transpose(1, 2), wanted.flatten(2).transpose(1, 2))


def num_channels(student: Shape, teacher: Shape) -> tuple[int, int]:
    """Return C and D of features of these shapes, without the batch, once they are matched; raises RecipeError."""
    pair = matched(torch.empty(1, *student, device="meta"), torch.empty(1, *teacher, device="meta"))
    return pair.student.shape[-1], pair.teacher.shape[-1]


def num_pooled(shape: Shape) -> int:
    """Return the channels of features of a shape, without the batch, once they are pooled."""
    return pooled(torch.empty(1, *shape, device="meta")).shape[1]


class Projection(nn.Linear):
    """A linear map of the last axis, a 1 × 1 convolution of maps; float32 also under autocast."""

    def forward(self, features: Tensor) -> Tensor:
        """Map [..., C] to [..., D]."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(at_least_float32(features))


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Build projections without biases from each width to the next, with ReLU between them."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.ReLU(), Projection(num_in, num_out, bias=False)]
    return nn.Sequential(*layers[1:])


class PlaceMap(nn.Module):
    """A map of one number a place, [B, H, W], of a teacher's feature as it is kept."""

    def __init__(self, student: Shape, kept: FeatureShape) -> None:
        """Take the shape at the student's tap, and what is kept; raises RecipeError if either has no places."""
        super().__init__()
        self._of_maps = kept.kind == "maps"
        as_maps(torch.empty(1, *student, device="meta"))
        self(torch.empty(1, *kept.shape, device="meta"))

    def forward(self, feature: Tensor) -> Tensor:
        """Return the attention of maps, and one number a place as such."""
        return attention(as_maps(feature)) if self._of_maps else as_places(feature)


def as_places(values: Tensor) -> Tensor:
    """Return one number a place, [B, H, W]: as it is, or of tokens [B, N] as a square, without their class token."""
    return values if values.ndim == 3 else as_maps(values[:, :, None])[:, 0]


def unit(vectors: Tensor) -> Tensor:
    """Divide vectors along the last axis by their L2 norm; if that is 0 they stay, and so does their gradient."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    directions: Tensor = vectors / norms.where(norms > 0, 1)
    return directions
