"""Features of modules that put channels last are kept as those of modules that put them first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.errors import MismatchError
from logitcache.teacher.online import live_targets
from logitcache.teacher.teacher import Teacher
from logitcache.views.keys import ViewKey
from tests.cache.made import contents, flip, run, shard_files
from tests.fixes import applied, entries, fix_of
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


def as_before(path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch, num_views: int, **recipe: Any) -> None:
    """Fill a cache as releases did that knew no layouts, and read every tap as [C, H, W] or [N, D]."""
    with monkeypatch.context() as before:
        before.setattr(Teacher, "decide_layouts", lambda self, pixels: None)
        run(path, images(20), net, views=VIEW | {"num_views": num_views}, **recipe)


def turned_tokens() -> nn.Module:
    """Return a network whose tap holds tokens [D, N]."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Flatten(2), nn.Identity(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)
    )


OLD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "maps": (Last, {name: FEATURES[name] for name in ("maps", "pooled", "tokens")}, "channels_first"),
    "tokens": (turned_tokens, {"maps": FEATURES["tokens"] | {"tap": "2"}}, "tokens"),
}


@pytest.mark.parametrize("case", OLD)
def test_a_cache_of_before_layouts_grows_and_is_repaired_by_the_fix_that_its_error_names(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, features, layout = OLD[case]
    net = build()
    recipe: dict[str, Any] = {"teachers": {"t": keeping(None, features)}, "shard_rows": 512}
    as_before(tmp_path / "c", net, monkeypatch, 1, **recipe)
    before = contents(tmp_path / "c")
    more = {"views": VIEW | {"num_views": 2}}
    with pytest.raises(MismatchError, match="made by another recipe") as refused:
        run(tmp_path / "c", images(20), net, **recipe, **more)
    found = dict(entries(fix_of(refused.value)))
    assert set(found["teachers.t.features"]) == features.keys() - {"tokens"}
    assert all(entry == {"layout": layout} for entry in found["teachers.t.features"].values())
    fixed = applied(recipe, *found.items())
    damaged = shard_files(tmp_path / "c", "t.maps")[0]
    flip(damaged, 5)
    assert run(tmp_path / "c", images(20), net, **fixed, views=VIEW).shards_written == 1
    assert contents(tmp_path / "c").items() >= before.items()
    assert run(tmp_path / "c", images(20), net, **fixed, **more).shards_written == 1
    as_before(tmp_path / "whole", net, monkeypatch, 2, **recipe)
    for name in features:
        grown, whole = (open_cache(tmp_path / made).rows([ViewKey(1, 3)])["t"] for made in ("c", "whole"))
        assert torch.equal(grown.features[name], whole.features[name])
