"""Features of modules that put channels last are kept as those of modules that put them first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.errors import MismatchError
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import run
from tests.teacher.nets import FEATURES, Net, images, keeping

KINDS = ("maps", "small", "pooled", "attention", "cam", "bytes", "projected")
KEYS = [ViewKey(0, index) for index in range(20)]
VIEW = {"num_views": 1, "seed": 3}


class Last(Net):
    """The same network, whose maps have their channels last at the tap."""

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.relu(self.conv(pixels.double()).permute(0, 2, 3, 1))
        tokens = self.tokens(maps.flatten(1, 2))
        return self.fc(tokens.tanh().mean(dim=1))


def make(path: Path, net: nn.Module, **layout: Any) -> Any:
    features = {name: FEATURES[name] | layout for name in KINDS}
    run(path, images(20), net, teachers={"t": keeping(None, features)}, views=VIEW, shard_rows=512)
    return open_cache(path)


def test_channels_last_are_kept_as_channels_first(tmp_path: Path) -> None:
    first, last = make(tmp_path / "first", Net()), make(tmp_path / "last", Last())
    wanted, found = (cache.rows(KEYS)["t"].features for cache in (first, last))
    for name in KINDS:
        torch.testing.assert_close(found[name], wanted[name], msg=name)
    kept = last.manifest.teachers["t"].features
    assert {kept[name].layout for name in KINDS} == {"channels_last"}
    assert "layout" not in first.manifest.model_dump(mode="json")["teachers"]["t"]["features"]["maps"]


def test_a_live_teacher_reads_the_layout_from_the_manifest(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", Last())
    pixels = torch.stack([torch.from_numpy(images(20).images[index]).permute(2, 0, 1) for index in range(20)])
    live = live_targets(str(tmp_path / "c"), "cpu", modules={"t": Last()})(pixels, torch.as_tensor(cache.labels))["t"]
    for name in ("maps", "pooled", "cam"):
        torch.testing.assert_close(live.features[name], cache.rows(KEYS)["t"].features[name])


def test_another_layout_does_not_continue_a_cache(tmp_path: Path) -> None:
    make(tmp_path / "c", Net())
    make(tmp_path / "c", Net(), layout="channels_first")
    with pytest.raises(MismatchError, match=r'features\.maps: the cache has .*"layout": "channels_last"'):
        make(tmp_path / "c", Net(), layout="channels_last")
