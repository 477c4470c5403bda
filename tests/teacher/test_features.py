"""What is kept of taps is what the modules put out: recomputed here, read back from the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from logitcache.cache.cache import Cache, open_cache
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError
from logitcache.logits import CompactLogits, log_probs
from logitcache.report.inspect import inspect_cache
from logitcache.stage_one.precompute import PrecomputeResult
from logitcache.targets import feature_values
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import AGAIN, contents, flip, run, verified
from tests.teacher.nets import CLASSES, FEATURES, Net, images, keeping

VIEWS = {"num_views": 2, "seed": 5, "augmentations": [{"kind": "horizontal_flip"}]}
HEAD = {"kind": "head", "dtype": "float32"}
TRANSFORM = {"kind": "transform", "step": 0.01, "corrections": 2}


def make(cache: Path, logits: Any = None, features: Any = None, net: nn.Module | None = None, **changes: Any) -> Any:
    entry = keeping(logits, features)
    options: dict[str, Any] = {"views": VIEWS, "teachers": {"t": entry}, "shard_rows": 512, **changes}
    result: PrecomputeResult = run(cache, images(), net or Net(), **options)
    return result


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("features") / "c.zarr"
    make(cache, HEAD, FEATURES)
    return cache


@pytest.fixture(scope="module")
def cache(path: Path) -> Cache:
    return open_cache(path)


@pytest.fixture(scope="module")
def keys() -> list[ViewKey]:
    return [ViewKey(view, index) for view in range(2) for index in range(60)]


@pytest.fixture(scope="module")
def pixels(cache: Cache, keys: list[ViewKey]) -> Tensor:
    views: Tensor = cache.views(images()).__getitems__(keys)
    return (views.double() / 255 - 0.5) / 0.5


def test_every_kind_is_what_the_module_puts_out(cache: Cache, keys: list[ViewKey], pixels: Tensor) -> None:
    net = Net()
    maps = functional.relu(net.conv(pixels))
    tokens = net.tokens(maps.flatten(2).transpose(1, 2))
    blocks = maps.reshape(len(maps), 6, 2, 2, 2, 2)
    wanted = {
        "maps": maps,
        "small": blocks.mean(dim=(3, 5)),
        "pooled": maps.sum(dim=(2, 3)) / 16,
        "tokens": tokens,
        "attention": (maps**2).sum(dim=1) / 6,
        "penultimate": tokens.tanh().mean(dim=1),
    }
    found = cache.rows(keys)["t"].features
    for name, values in wanted.items():
        assert torch.allclose(feature_values(found[name]).double(), values, atol=1e-5), name


def test_a_grad_cam_map_is_that_of_the_label(cache: Cache, keys: list[ViewKey], pixels: Tensor) -> None:
    net = Net()
    found = feature_values(cache.rows(keys)["t"].features["cam"]).double()
    for row, key in enumerate(keys[::7]):
        maps = functional.relu(net.conv(pixels[7 * row : 7 * row + 1])).detach()
        label = int(images().targets[key.index])  # type: ignore[index]
        weights = torch.zeros(6, dtype=torch.float64)
        for channel in range(6):  # by finite differences, of the logit by the whole channel
            moved = torch.zeros_like(maps)
            moved[0, channel] = 1e-6
            up, down = (
                net.fc(net.tokens((maps + s * moved).flatten(2).transpose(1, 2)).tanh().mean(1)) for s in (1, -1)
            )
            weights[channel] = (up - down)[0, label] / 2e-6 / 16
        wanted = torch.relu((weights[:, None, None] * maps[0]).sum(dim=0))
        assert torch.allclose(found[7 * row], wanted, atol=1e-6)


def test_a_map_of_an_unlabelled_image_is_that_of_the_answer(tmp_path: Path) -> None:
    entry = keeping(None, {"cam": FEATURES["cam"]})
    unlabelled, same = images(), images()
    unlabelled.targets = None
    seen = (torch.from_numpy(same.images).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    net = Net()
    net.fc.bias -= net(seen).mean(dim=0)  # so that it answers with every class
    same.targets = net(seen).argmax(1).numpy()
    found = []
    for name, data in (("a", unlabelled), ("b", same)):
        run(tmp_path / name, data, net, teachers={"t": entry}, views={"num_views": 1}, shard_rows=512)
        rows = open_cache(tmp_path / name).rows([ViewKey(0, index) for index in range(60)])
        found.append(feature_values(rows["t"].features["cam"]))
    assert torch.equal(found[0], found[1])
    assert float(found[0].max()) > 0


def test_bytes_err_by_half_a_level_of_their_channel(cache: Cache, keys: list[ViewKey]) -> None:
    features = cache.rows(keys)["t"].features
    exact, found = (feature_values(features[name]) for name in ("maps", "bytes"))
    level = exact.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert bool(((found - exact).abs() <= 0.505 * level + 1e-7).all())


def test_a_projection_is_the_best_of_its_width(cache: Cache, keys: list[ViewKey]) -> None:
    features = cache.rows(keys)["t"].features
    exact, found = (feature_values(features[name]).double() for name in ("maps", "projected"))
    assert found.shape == exact.shape
    vectors = exact.movedim(1, -1).reshape(-1, 6)
    centred = vectors - vectors.mean(dim=0)
    best = float(torch.linalg.svdvals(centred)[3:].square().sum())  # Eckart and Young
    error = float((found - exact).square().sum())
    assert best * 0.999 <= error <= best * 1.02  # fitted to a few places of each row


def test_errors_of_all_rows_are_in_the_manifest(path: Path, cache: Cache, keys: list[ViewKey]) -> None:
    rows = cache.rows(keys)["t"]
    errors = cache.manifest.teachers["t"].errors
    assert set(errors) == {"bytes", "projected", "projected_tokens", "logits"}
    exact, found = (feature_values(rows.features[name]).flatten(1).double() for name in ("tokens", "projected_tokens"))
    relative = (found - exact).square().sum(1) / exact.square().sum(1)
    assert errors["projected_tokens"].mean == pytest.approx(float(relative.mean()), rel=1e-4)
    assert errors["projected_tokens"].max == pytest.approx(float(relative.max()), rel=1e-4)
    assert errors["projected_tokens"].p999 == pytest.approx(float(relative.max()), rel=1e-4)
    teacher = inspect_cache(path)["teachers"]["t"]
    told = {(row["target"], row["temperature"]): row["mean"] for row in teacher["errors"]}
    assert told["projected_tokens", None] == errors["projected_tokens"].mean
    assert told.keys() == {*((name, None) for name in errors if name != "logits"), ("logits", 1.0), ("logits", 4.0)}
    shown = {row["target"]: row for row in teacher["targets"]}
    assert (shown["logits"]["errors"], shown["maps"]["errors"]) == ("recorded", "not recorded")
    assert shown["maps"]["bytes_per_row"] > shown["small"]["bytes_per_row"]


def test_a_head_gives_every_logit(cache: Cache, keys: list[ViewKey], pixels: Tensor) -> None:
    logits = cache.rows(keys)["t"].logits
    assert torch.allclose(log_probs(logits).double(), torch.log_softmax(Net()(pixels), dim=1), atol=1e-5)
    weight, bias = cache.head("t") or (None, None)
    assert weight is not None
    assert bias is not None
    assert torch.allclose(weight.double(), Net().fc.weight)
    assert torch.allclose(bias.double(), Net().fc.bias)


def test_the_live_teacher_has_the_same_features(path: Path, keys: list[ViewKey]) -> None:
    cache = open_cache(path)
    views = cache.views(images())
    live = live_targets(str(path), "cpu", modules={"t": Net()})
    labels = torch.from_numpy(cache.labels[[key.index for key in keys]])
    found, stored = live(views.__getitems__(keys), labels)["t"].features, cache.rows(keys)["t"].features
    assert found.keys() == stored.keys()
    for name in ("maps", "small", "pooled", "tokens", "attention", "cam", "penultimate"):
        assert torch.allclose(feature_values(found[name]), feature_values(stored[name]), atol=1e-6), name


def test_encoded_logits_hold_what_they_are_decoded_from_and_no_more(tmp_path: Path, cache: Cache) -> None:
    key = [ViewKey(0, 3)]
    make(tmp_path / "c", {"kind": "uint8", "storage": "packed"}, FEATURES)
    beside_maps, head = open_cache(tmp_path / "c").rows(key)["t"].compact, cache.rows(key)["t"].compact
    assert isinstance(beside_maps, CompactLogits)
    assert isinstance(head, CompactLogits)
    assert set(beside_maps.rows) == {"level", "scale"}
    assert set(head.rows) == {"penultimate"}


def test_only_reads_nothing_else(path: Path, tmp_path: Path, keys: list[ViewKey]) -> None:
    cache = open_cache(path).only({"t": ["pooled"]})
    rows = cache.rows(keys)["t"]
    assert set(rows.features) == {"pooled"}
    assert {array.name for array in cache.layout.arrays} == {"t.pooled"}
    with pytest.raises(RecipeError, match="of this teacher only features are kept"):
        log_probs(rows.logits)
    assert set(open_cache(path).only({"t": ["logits"]}).rows(keys)["t"].features) == {"penultimate"}
    with pytest.raises(RecipeError, match=r"has no \['other'\] of teacher 't'"):
        open_cache(path).only({"t": ["other"]})


def test_features_are_added_to_a_finished_cache(tmp_path: Path) -> None:
    few = {name: FEATURES[name] for name in ("pooled", "projected")}
    make(tmp_path / "c", TRANSFORM, {})
    before, digest = contents(tmp_path / "c"), open_cache(tmp_path / "c").manifest.content_digest()
    result = make(tmp_path / "c", TRANSFORM, few)
    assert result.shards_written == result.shards
    after = contents(tmp_path / "c")
    assert all(after[name] == before[name] for name in before if "/c" in name)
    make(tmp_path / "at_once", TRANSFORM, few)
    whole = contents(tmp_path / "at_once")
    assert {name: data for name, data in after.items() if name != "zarr.json"} == {
        name: data for name, data in whole.items() if name != "zarr.json"
    }
    grown = open_cache(tmp_path / "c")
    assert grown.only({"t": ["logits"]}).manifest.content_digest() == digest
    assert grown.manifest.teachers == open_cache(tmp_path / "at_once").manifest.teachers
    assert make(tmp_path / "c", TRANSFORM, {}).shards_written == 0  # asks for less


def test_a_run_that_stopped_continues_with_the_same_tables(tmp_path: Path) -> None:
    class Stopping(Net):
        passes = 0

        def forward(self, images: Tensor) -> Tensor:
            self.passes += 1
            if self.passes > self.allowed:
                raise KeyboardInterrupt
            return super().forward(images)

        allowed = 8 + AGAIN

    entry = keeping(TRANSFORM, {"projected": FEATURES["projected"]})
    options: dict[str, Any] = {"views": VIEWS, "teachers": {"t": entry}, "batch_size": 15, "shard_rows": 30}
    run(tmp_path / "whole", images(), Net(), **options)
    stopping = Stopping()
    with pytest.raises(BaseException):  # noqa: B017, PT011  # as the library ends it
        run(tmp_path / "c", images(), stopping, **options)
    stopping.allowed = 10**6
    run(tmp_path / "c", images(), stopping, **options)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["t.logits.basis/c/0/0", "t.projected.centre/c/0", "t.logits.centre/zarr.json"])
def test_a_damaged_table_is_found_and_fitted_again(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    make(cache, TRANSFORM, {"projected": FEATURES["projected"]})
    sound = contents(cache)
    flip(cache / name, 3)
    assert any(name in problem for problem in verified(cache))
    with pytest.raises(CacheError, match="damaged"):
        open_cache(cache)
    make(cache, TRANSFORM, {"projected": FEATURES["projected"]})
    assert contents(cache) == sound


def test_features_alone_are_kept_of_a_network_that_predicts_no_classes(tmp_path: Path) -> None:
    class Backbone(Net):
        def forward(self, images: Tensor) -> Any:
            return (super().forward(images), "and more")

    entry = keeping({}, {"pooled": FEATURES["pooled"]})
    run(tmp_path / "c", images(), Backbone(), views=VIEWS, teachers={"t": entry}, shard_rows=512)
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.teachers["t"].num_classes is None
    assert set(cache.rows([ViewKey(0, 0)])["t"].features) == {"pooled"}
    assert inspect_cache(tmp_path / "c")["teachers"]["t"]["top1"] is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": ({"kind": "maps", "tap": "rleu"}, r"has no module 'rleu'.*\n.*Did you mean 'relu'"),
    "never fires": ({"kind": "maps", "tap": "idle"}, "'idle' did not fire"),
    "vectors have no places": ({"kind": "attention", "tap": "fc"}, "has no places"),
    "all channels": ({"kind": "maps", "tap": "relu", "channels": 6}, "channels: 6 of 6"),
    "logits do not depend": ({"kind": "grad_cam", "tap": "idle"}, "did not fire"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tap_that_cannot_be_is_refused_by_name(case: str, tmp_path: Path) -> None:
    feature, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        make(tmp_path / "c", None, {"f": feature})
    assert not (tmp_path / "c").exists()


def test_a_module_that_runs_twice_and_a_value_that_is_changed_later_are_refused(tmp_path: Path) -> None:
    class Twice(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.relu(self.tokens(self.relu(self.conv(images.double())).mean(dim=(2, 3)))))

    with pytest.raises(RecipeError, match="'relu' fired 2 times"):
        make(tmp_path / "c", None, {"f": FEATURES["maps"]}, Twice())
    net = Net()
    net.relu = nn.ReLU(inplace=True)
    with pytest.raises(RecipeError, match="'conv' is changed in place"):
        make(tmp_path / "c", None, {"f": {"kind": "maps", "tap": "conv"}}, net)


def test_a_head_that_does_not_make_the_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the logits are not what 'tokens' puts out"):
        make(tmp_path / "c", {"kind": "head", "module": "tokens"})
    with pytest.raises(RecipeError, match="'relu' is none"):
        make(tmp_path / "c", {"kind": "head", "module": "relu"})


def test_another_feature_of_the_same_name_is_another_cache(path: Path) -> None:
    changed = FEATURES | {"pooled": FEATURES["pooled"] | {"dtype": "float16"}}
    with pytest.raises(MismatchError, match=r"teachers\.t\.features\.pooled"):
        make(path, HEAD, changed)


def test_what_does_not_fit_the_stored_numbers_is_refused_by_image(tmp_path: Path) -> None:
    net = Net()
    net.conv.weight.mul_(1e7)
    with pytest.raises(
        DataError, match=r"the feature 'f' of image '\d+' does not fit torch.float16.*\n.*features\.f\.dtype: float32"
    ):
        make(tmp_path / "c", None, {"f": {"kind": "pooled", "tap": "relu", "storage": "packed"}}, net)


def test_the_hooks_are_off_the_callers_network_afterwards(tmp_path: Path) -> None:
    net = Net()
    make(tmp_path / "c", HEAD, FEATURES, net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_auto_meets_its_budget_on_all_rows(tmp_path: Path) -> None:
    make(tmp_path / "c", {"kind": "auto", "max_kl": 0.01, "temperature": 2.0})
    entry = open_cache(tmp_path / "c").manifest.teachers["t"]
    errors = {one.temperature: one for one in entry.errors_of("logits")}
    assert errors.keys() == {1.0, 2.0, 4.0}
    assert errors[2.0].mean <= 0.011
    assert entry.num_classes == CLASSES
    assert np.isfinite(errors[2.0].p999)


def test_a_table_of_a_cache_that_has_grown_is_fitted_to_the_same_views_again(tmp_path: Path) -> None:
    cache, features = tmp_path / "c", {"projected": FEATURES["projected"]}
    flips: dict[str, Any] = {"seed": 5, "augmentations": [{"kind": "horizontal_flip"}]}
    make(cache, TRANSFORM, features, views=flips | {"num_views": 1})
    make(cache, TRANSFORM, features, views=flips | {"num_views": 3})
    sound = contents(cache)
    assert open_cache(cache).manifest.teachers["t"].stored_features["projected"].calibration_views == 1
    for name in ("t.logits.basis/c/0/0", "t.projected.basis/c/0/0"):
        flip(cache / name, 5)
    make(cache, TRANSFORM, features, views=flips | {"num_views": 3})
    assert contents(cache) == sound


def test_a_damaged_table_is_mended_while_a_feature_is_added(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    make(cache, TRANSFORM, {})
    sound = (cache / "t.logits.basis/c/0/0").read_bytes()
    flip(cache / "t.logits.basis/c/0/0", 5)
    make(cache, TRANSFORM, {"pooled": FEATURES["pooled"]})
    assert (cache / "t.logits.basis/c/0/0").read_bytes() == sound
    assert verified(cache) == ()


def test_errors_are_right_where_a_shard_is_one_row(tmp_path: Path) -> None:
    entry = keeping(TRANSFORM, {})
    run(tmp_path / "c", images(7), Net(), views=VIEWS, teachers={"t": entry}, shard_rows=1)
    for errors in open_cache(tmp_path / "c").manifest.teachers["t"].errors_of("logits"):
        assert 0 < errors.mean <= errors.max < 1e-3


def test_a_head_whose_input_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    net = Net()
    net.tokens.weight.mul_(0)
    net.tokens.bias.fill_(1.0)

    class Large(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.fc(net.tokens(self.relu(self.conv(images.double())).mean(dim=(2, 3))) * 1e5)

    with pytest.raises(
        DataError, match=r"'penultimate' of image .* does not fit .*\n.*logits: \{kind: head, dtype: float32\}"
    ):
        make(tmp_path / "c", {"kind": "head", "storage": "packed"}, {}, Large())


def test_a_grad_cam_map_needs_a_teacher_of_the_labels_classes(tmp_path: Path) -> None:
    entry = keeping({}, {"cam": FEATURES["cam"]})
    with pytest.raises(MismatchError, match="predicts 7 classes, the data set has 5"):
        run(tmp_path / "c", images(), Net(num_classes=7), teachers={"t": entry}, shard_rows=512)
    with pytest.raises(RecipeError, match="name features"):
        run(tmp_path / "c", images(), Net(), teachers={"t": keeping({}, {})})
