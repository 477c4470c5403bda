"""Find the axis of the channels in a tapped tensor: the others change with the size of the image."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from logitcache.errors import RecipeError
from logitcache.models.taps.taps import Tapped
from logitcache.reductions import ChannelLayout

Shape = tuple[int, ...]


class TapLayout(NamedTuple):
    """A tap and the layout that the recipe gives for it."""

    tap: str
    layout: ChannelLayout = "auto"


def layouts_of(network: nn.Module, inputs: Tensor, asked: Sequence[TapLayout], who: str) -> list[ChannelLayout]:
    """Return the layout of each tap as `known_layouts` does; raise RecipeError for maps whose layout is unknown."""
    found = known_layouts(network, inputs, asked, who)
    for (tap, _), (shape, layout) in zip(asked, found, strict=True):
        if layout is None:
            raise RecipeError(
                f"{who}: the tap {tap!r} holds {list(shape)} for each image, and the axis of the channels is not "
                "known. Fix: layout: channels_first for [C, H, W], layout: channels_last for [H, W, C]"
            )
    return [layout for _, layout in found if layout is not None]


class KnownLayout(NamedTuple):
    """The shape of a tapped tensor without the batch, and its layout; None if it is not known."""

    shape: Shape
    layout: ChannelLayout | None


def known_layouts(network: nn.Module, inputs: Tensor, asked: Sequence[TapLayout], who: str) -> list[KnownLayout]:
    """Return the layout of each tap: `auto` for maps [C, H, W], tokens [N, D] and vectors, which need no change.

    inputs: float [B, C, h, w] for the network. `auto` is decided by which axes change when the image is twice
    as large; for a network of one size by `feature_info`, as of timm, or by which two axes of a square image's maps are
    equal. `who` names the network in errors. Raises RecipeError for a layout that a tap cannot have.
    """
    larger: dict[str, Shape] = {}
    with closing(Tapped(network, network, [one.tap for one in asked], who)) as tapped, torch.no_grad():
        own = {tap: tuple(value.shape[1:]) for tap, value in tapped(inputs)[1].items()}
        if any(layout == "auto" and len(own[tap]) > 1 for tap, layout in asked):
            larger = tapped.shapes_until_error(functional.interpolate(inputs, scale_factor=2.0))
    known, is_square = _known_channels(network), inputs.shape[2] == inputs.shape[3]
    found: list[KnownLayout] = []
    for tap, layout in asked:
        shape, doubled = own[tap], larger.get(tap)
        if layout != "auto":
            decided: ChannelLayout | None = _given(tap, layout, shape, who)
        else:
            decided = _maps(shape, doubled, known.get(tap), is_square) if len(shape) == 3 else _tokens(shape, doubled)
        found.append(KnownLayout(shape, decided))
    return found


def _given(tap: str, layout: ChannelLayout, shape: Shape, who: str) -> ChannelLayout:
    """Return a layout that the user gives; raise RecipeError if the tap's shape cannot have it."""
    if len(shape) == 3 and layout != "tokens":
        return "channels_last" if layout == "channels_last" else "auto"
    if len(shape) == 2:
        return "channels_first" if layout == "channels_first" else "auto"
    raise RecipeError(
        f"{who}: the tap {tap!r} holds {list(shape)} for each image, which has no layout {layout!r}. Fix: layout: auto"
    )


def _maps(shape: Shape, larger: Shape | None, num_channels: int | None, is_square: bool) -> ChannelLayout | None:
    if larger is not None and len(larger) == 3:
        changed = {axis for axis in range(3) if shape[axis] != larger[axis]}
        if 2 in changed and 0 not in changed:
            return "auto"
        if 0 in changed and 2 not in changed:
            return "channels_last"
    if num_channels in shape and shape[0] != shape[2]:
        return "auto" if shape[0] == num_channels else "channels_last"
    if is_square and shape[0] != shape[2] and shape[1] in (shape[0], shape[2]):
        return "auto" if shape[1] == shape[2] else "channels_last"
    return None


def _tokens(shape: Shape, larger: Shape | None) -> ChannelLayout:
    """Return `channels_first` for [C, N], if the second axis alone changes with the size of the image."""
    is_turned = larger is not None and len(shape) == len(larger) == 2 and shape[0] == larger[0] and shape != larger
    return "channels_first" if is_turned else "auto"


def _known_channels(network: nn.Module) -> Mapping[str, int]:
    """Return the number of channels of modules by path, if the network lists them, as those of timm do."""
    listed: Any = getattr(network, "feature_info", None)
    entries = listed if isinstance(listed, (list, tuple)) else getattr(listed, "info", ())
    known = [entry for entry in entries if isinstance(entry, dict)]
    return {entry["module"]: entry["num_chs"] for entry in known if "module" in entry and "num_chs" in entry}
