"""Which axis numbers the channels: of networks of timm, of any size and of one, and refused where nothing says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.models.taps.layouts import TapLayout, layouts_of
from logitcache.reductions import channels_in_place


class Turn(nn.Module):
    """Brings axes into another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, values: Tensor) -> Tensor:
        return values.permute(self.order)


class OneSize(nn.Module):
    """Takes images of one size, as a vision transformer does."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == self.side, "another size"
        return images


def network(channels: int, turned: bool, side: int | None = None) -> nn.Sequential:
    """Put out maps of 8 by 8 places in `0`'s order or with channels last, then a pooled vector."""
    first = nn.Identity() if side is None else OneSize(side)
    order = (0, 2, 3, 1) if turned else (0, 1, 2, 3)
    return nn.Sequential(first, nn.Conv2d(3, channels, 2, stride=2), Turn(*order), nn.Flatten(1, 2))


def decided(net: nn.Module, shape: tuple[int, int], tap: str = "2", layout: Any = "auto") -> Any:
    return layouts_of(net.eval(), torch.rand(1, 3, *shape), [TapLayout(tap, layout)], "the model")[0]


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
@pytest.mark.parametrize("channels", [5, 8, 12])
@pytest.mark.parametrize("turned", [False, True])
def test_what_changes_with_the_image_decides(turned: bool, channels: int, shape: tuple[int, int]) -> None:
    assert decided(network(channels, turned), shape) == ("channels_last" if turned else "auto")


@pytest.mark.parametrize("turned", [False, True])
def test_equal_sides_decide_for_a_network_of_one_size(turned: bool) -> None:
    assert decided(network(5, turned, 16), (16, 16)) == ("channels_last" if turned else "auto")


def test_what_a_network_lists_of_its_modules_decides() -> None:
    net = network(5, True, 24)
    net.feature_info = [{"num_chs": 5, "module": "2"}]  # type: ignore[assignment]
    assert decided(net, (16, 24)) == "channels_last"


@pytest.mark.parametrize(("channels", "shape"), [(8, (16, 16)), (5, (14, 16))])
def test_what_nothing_decides_is_refused_and_its_fix_works(channels: int, shape: tuple[int, int]) -> None:
    net = network(channels, True, 16)
    with pytest.raises(RecipeError, match="the axis of the channels is not known") as caught:
        decided(net, shape)
    assert "layout: channels_last for [H, W, C]" in str(caught.value)
    assert decided(net, shape, layout="channels_last") == "channels_last"
    assert decided(net, shape, layout="channels_first") == "auto"


def test_tokens_may_be_turned_and_vectors_have_no_layout() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 5, 2, stride=2), nn.Flatten(2), Turn(0, 2, 1), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten()
    )
    assert [decided(net, (16, 16), tap) for tap in ("1", "2", "4")] == ["channels_first", "auto", "auto"]
    assert decided(net, (16, 16), "1", "tokens") == "auto"
    assert channels_in_place(torch.rand(2, 5, 64), "channels_first").shape == (2, 64, 5)
    with pytest.raises(RecipeError, match=r"holds \[5\] for each image, which has no layout 'channels_last'"):
        decided(net, (16, 16), "4", "channels_last")


@pytest.mark.parametrize("strict", [True, False])
def test_stages_of_swin_put_channels_last(strict: bool) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    net = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, strict_img_size=strict, **options)
    taps = [TapLayout(tap) for tap in ("patch_embed.proj", "layers.0", "layers.1", "norm", "head")]
    found = layouts_of(net.eval(), torch.rand(1, 3, 32, 32), taps, "the model")
    assert found == ["auto", "channels_last", "channels_last", "channels_last", "auto"]
