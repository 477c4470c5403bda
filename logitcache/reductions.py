"""Reductions of features: the same for what is stored of a teacher and for what a student is compared by.

Features are maps [B, C, H, W], tokens [B, N, D] or vectors [B, D].
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from logitcache.errors import RecipeError

FeatureKind = Literal["pooled", "maps", "attention", "grad_cam"]
"""pooled: [D]. maps: as the module gives them, [C, H, W], [N, D] or [D]. attention, grad_cam: [H, W] or [N]."""


ChannelLayout = Literal["auto", "channels_first", "channels_last", "tokens"]
"""Where a module puts its channels: [C, H, W], [H, W, C] or tokens [N, D]; `auto` is to be decided.

Once it is decided, `auto` is what needs no change: maps [C, H, W], tokens [N, D] and vectors.
"""


INPUT = ":input"
"""Suffix of a tap of a module's input, as in `fc:input`; without it, a tap is of the output."""


class FeatureShape(NamedTuple):
    """What a feature is, and its shape without the batch."""

    kind: FeatureKind
    shape: tuple[int, ...]


def channels_in_place(values: Tensor, layout: ChannelLayout) -> Tensor:
    """Return maps [B, C, H, W] or tokens [B, N, D] of what a tap holds in a layout that is decided."""
    if values.ndim == 4 and layout == "channels_last":
        return values.movedim(3, 1)
    return values.transpose(1, 2) if values.ndim == 3 and layout == "channels_first" else values


def pooled(features: Tensor) -> Tensor:
    """Return the mean over places or tokens, [B, C]; vectors as they are."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


def attention(features: Tensor) -> Tensor:
    """Return the mean of squares over channels: [B, H, W] of maps, [B, N] of tokens (Zagoruyko and Komodakis 2017)."""
    return features.square().mean(dim=channel_axis(features))


def grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """Return relu(Σ_k w_k A_k), w_k the mean gradient of channel k: [B, H, W] of maps, [B, N] of tokens.

    gradient: of the logit of one class, in the shape of the features (Selvaraju et al., "Grad-CAM", ICCV 2017).
    """
    axis = channel_axis(features)
    places = tuple(dim for dim in range(1, features.ndim) if dim != axis)
    return torch.relu((gradient.mean(dim=places, keepdim=True) * features).sum(dim=axis))


def channel_axis(features: Tensor) -> int:
    """Return which axis of maps or tokens numbers the channels; raise RecipeError for vectors, which have no places."""
    if features.ndim not in (3, 4):
        raise RecipeError(
            f"a feature of shape {list(features.shape[1:])} has no places. Fix: tap maps [C, H, W] or tokens [N, D], "
            "or keep it pooled"
        )
    return 1 if features.ndim == 4 else 2


def as_maps(features: Tensor) -> Tensor:
    """Return maps [B, C, H, W]: maps as they are, tokens as a square, without their class token if there is one."""
    if features.ndim == 4:
        return features
    channel_axis(features)
    count = features.shape[1]
    side = math.isqrt(count)
    if side * side != count:
        side = math.isqrt(count - 1)
    if side == 0 or count - side * side > 1:
        raise RecipeError(f"{count} tokens are no square, with or without a class token. Fix: compare them pooled")
    return features[:, count - side * side :].transpose(1, 2).reshape(len(features), -1, side, side)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps [B, C, H, W] or [B, H, W] to another size, by means of areas if it is smaller, else bilinearly."""
    if maps.shape[-2:] == size:
        return maps
    values = maps if maps.ndim == 4 else maps[:, None]
    if size[0] <= maps.shape[-2] and size[1] <= maps.shape[-1]:
        values = functional.adaptive_avg_pool2d(values, size)
    else:
        values = functional.interpolate(values, size, mode="bilinear", align_corners=False)
    return values if maps.ndim == 4 else values[:, 0]
