"""Variants of a teacher's network: the same answers within a bound, chosen once, recorded, and used by all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn import functional

from logitcache.cache.cache import open_cache
from logitcache.classifier import PLAIN, Variant
from logitcache.errors import MismatchError, RecipeError
from logitcache.models.variants import batch_norms, variant_of
from logitcache.stage_one.precompute import open_precompute_task, precompute
from logitcache.teacher import speed
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, contents, recipe, shard_files, teacher, write_images
from tests.teacher.nets import CLASSES, SIDE, images

BOTH = {"channels_last": True, "fold": True}
EVERY_KIND = {
    "maps": {"kind": "maps", "tap": "relu", "dtype": "float32", "storage": "packed"},
    "pooled": {"kind": "pooled", "tap": "norm", "dtype": "float32", "storage": "packed"},
    "attention": {"kind": "attention", "tap": "relu", "dtype": "float32", "storage": "packed"},
    "cam": {"kind": "grad_cam", "tap": "relu", "dtype": "float32", "storage": "packed"},
}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3}


class Normed(nn.Module):
    """A convolution, its BatchNorm with statistics of its own, and a linear layer."""

    def __init__(self, affine: bool = True, reuses: bool = False) -> None:
        super().__init__()
        self.reuses = reuses
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=affine)
            self.norm = nn.BatchNorm2d(6, affine=affine)
            self.relu = nn.ReLU()
            self.fc = nn.Linear(6, CLASSES)
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.1, 4)
            for parameter in self.norm.parameters():
                nn.init.uniform_(parameter, -2, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.conv(pixels)
        out = self.relu(self.norm(maps))
        return self.fc((out + maps if self.reuses else out).mean(dim=(2, 3)))


def normed() -> nn.Module:
    """Stand in for a user's own factory."""
    return Normed()


MODEL = {"kind": "custom", "factory": f"{__name__}:normed"}


def run(cache: Path, module: nn.Module | None = None, **entry: Any) -> Any:
    entry = {"logits": DENSE32 | {"storage": "packed"}} | entry
    wanted = recipe(cache, teachers={"t": teacher(**entry)}, views={"num_views": 1}, shard_rows=20, batch_size=20)
    return precompute(wanted, teachers={"t": module or Normed()}, dataset=images())


def kept(cache: Path) -> dict[str, Tensor]:
    answers = open_cache(cache).answers([ViewKey(0, index) for index in range(60)])["t"]
    return {"logits": answers.logits, **dict(answers.features)}


@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_network_computes_convolution_and_batch_norm(affine: bool) -> None:
    network, pixels = Normed(affine).eval(), torch.randn(4, 3, SIDE, SIDE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert batch_norms(network, pixels) == [("conv", "norm")]
    folded = variant_of(network, Variant(fold=True), pixels)
    convolved = functional.conv2d(pixels.double(), network.conv.weight.double(), stride=2, padding=1)
    bias = network.conv.bias.double() if affine else torch.zeros(6)
    centred = convolved + bias.view(-1, 1, 1) - network.norm.running_mean.double().view(-1, 1, 1)
    wanted = centred / (network.norm.running_var.double() + network.norm.eps).sqrt().view(-1, 1, 1)
    if affine:
        wanted = wanted * network.norm.weight.double().view(-1, 1, 1) + network.norm.bias.double().view(-1, 1, 1)
    torch.testing.assert_close(folded.conv(pixels), wanted.float(), rtol=1e-5, atol=1e-5)
    assert list(folded.norm.children()) == []
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.Hardswish, None])
def test_batch_norm_with_an_activation_of_timm_is_folded(act_layer: type[nn.Module] | None) -> None:
    layers = pytest.importorskip("timm.layers")
    network = Normed()
    norm = layers.BatchNormAct2d(6, apply_act=act_layer is not None, act_layer=act_layer or nn.ReLU)
    norm.load_state_dict(network.norm.state_dict())
    network.norm, pixels = norm, torch.randn(4, 3, SIDE, SIDE)
    network.eval()
    folded = variant_of(network, Variant(fold=True), pixels)
    found, wanted = folded.norm(folded.conv(pixels)), norm(network.conv(pixels))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert bool((folded.conv(pixels) < 0).any())
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
    assert dict(folded.named_modules()).keys() == dict(network.named_modules()).keys()  # taps keep their names


def test_every_batch_norm_of_a_network_of_timm_is_folded() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network, pixels = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES).eval(), torch.randn(2, 3, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    wanted, folded = network(pixels), variant_of(network, Variant(fold=True), pixels)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
    torch.testing.assert_close(folded(pixels), wanted, rtol=1e-3, atol=1e-4)


def test_batch_norms_that_cannot_be_folded_are_left() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.own = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.norm(self.conv(self.conv(pixels))) + self.own(pixels)

    pixels = torch.randn(2, 3, 4, 4)
    assert batch_norms(Twice().eval(), pixels) == []
    assert batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), pixels) == []  # in training mode
    of_the_batch = nn.BatchNorm2d(3, track_running_stats=False)
    assert batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), of_the_batch).eval(), pixels) == []


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `torch.compile` trace networks and run the trace, without a compiler of C++; return the sizes of batches."""
    compiled, sizes = torch.compile, list[int]()

    def backend(graph: Any, inputs: list[Any]) -> Any:
        assert inductor.freezing  # or weights are not laid out for the kernels
        sizes.extend(len(one) for one in inputs if isinstance(one, Tensor) and one.shape[1:] == (3, SIDE, SIDE))
        return graph

    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend=backend, **options))
    return sizes


@pytest.mark.parametrize("variant", [{"channels_last": True}, {"fold": True}, BOTH, {"compile": True}])
def test_every_target_of_a_variant_is_that_of_the_plain_network(
    tmp_path: Path, variant: dict[str, bool], graphs: list[int]
) -> None:
    module = Normed()
    run(tmp_path / "plain", module, features=EVERY_KIND)
    run(tmp_path / "fast", module, features=EVERY_KIND, speed=variant)
    plain, fast = kept(tmp_path / "plain"), kept(tmp_path / "fast")
    assert plain.keys() == fast.keys() == {"logits", *EVERY_KIND}
    for name, values in plain.items():
        torch.testing.assert_close(fast[name], values, rtol=1e-4, atol=1e-4)
    assert open_cache(tmp_path / "fast").manifest.teachers["t"].speed == Variant(**variant)
    assert "speed" not in (tmp_path / "plain/zarr.json").read_text()  # as releases without variants stored it
    assert ("compile" in (tmp_path / "fast/zarr.json").read_text()) == ("compile" in variant)  # as releases before it
    assert (20 in graphs) == ("compile" in variant)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("module", "features"),
    [(Normed(reuses=True), {}), (Normed(), {"maps": {"kind": "maps", "tap": "conv", "storage": "packed"}})],
    ids=["used twice", "tapped"],
)
def test_a_variant_that_changes_a_target_is_refused_and_left_out_by_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: nn.Module, features: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=r"teachers\.t\.speed: with fold, .* differ by .* Fix: leave it out"):
        run(tmp_path / "c", module, features=features, speed={"fold": True})
    tried = gains(monkeypatch, {"channels_last": 1.2, "fold": 9.0, "channels_last and fold": 9.0})
    run(tmp_path / "c", module, features=features, speed="auto")
    assert tried == ["channels_last"]
    assert open_cache(tmp_path / "c").manifest.teachers["t"].speed == Variant(channels_last=True)


def gains(monkeypatch: pytest.MonkeyPatch, by_text: dict[str, float]) -> list[str]:
    """Let variants gain so much; return the list of those that are timed."""
    timed: list[str] = []

    def gain(self: Any, made: object, variant: Variant) -> float:
        timed.append(variant.text)
        return by_text[variant.text]

    monkeypatch.setattr(speed._Trial, "_gain", gain)
    return timed


def test_auto_takes_the_fastest_once_and_all_that_follows_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "c"
    timed = gains(monkeypatch, {"channels_last": 1.2, "fold": 1.6, "channels_last and fold": 1.4})
    run(cache, speed="auto")
    assert timed == ["channels_last", "fold", "channels_last and fold"]
    assert "fold is 1.60 times as fast here; answers differ by at most" in caplog.text
    assert open_cache(cache).manifest.teachers["t"].speed == Variant(fold=True)
    before = contents(cache)
    shard_files(cache)[1].unlink()
    gains(monkeypatch, {})  # nothing is timed again
    run(cache, speed="auto")
    assert contents(cache) == before
    shard_files(cache)[0].unlink()
    run(cache, speed={"fold": True})
    assert contents(cache) == before
    with pytest.raises(MismatchError, match=r"teachers\.t\.speed: the cache has .*true.*, the recipe None"):
        run(cache)


def test_auto_of_a_network_that_gains_nothing_is_the_plain_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gains(monkeypatch, {"channels_last": 1.04, "fold": 0.9, "channels_last and fold": 1.0})
    run(tmp_path / "auto", speed="auto")
    run(tmp_path / "plain")
    assert contents(tmp_path / "auto") == contents(tmp_path / "plain")
    assert "no variant of its network is faster here" in caplog.text


def test_gains_are_measured_beside_the_plain_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: Any) -> float:
        return 1.0 if self._teacher.variant == PLAIN else 0.5 if self._teacher.variant.fold else 0.8

    monkeypatch.setattr(speed._Trial, "_seconds", seconds)
    run(tmp_path / "c", speed="auto")
    assert open_cache(tmp_path / "c").manifest.teachers["t"].speed == Variant(fold=True)


def test_workers_and_live_teachers_answer_by_the_recorded_variant(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    data = {
        "kind": "image_folder",
        "root": str(write_images(tmp_path / "photos", {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, SIDE)),
    }
    entry = teacher(DENSE32, model=MODEL, speed=BOTH)
    wanted = recipe(
        cache,
        dataset=data,
        teachers={"t": entry},
        views={"num_views": 1},
        batch_size=20,
    )
    precompute(wanted)
    opened = open_cache(cache)
    keys = [ViewKey(0, index) for index in range(10)]
    labels = torch.from_numpy(opened.labels)
    pixels = torch.stack([opened.views()[key] for key in keys])
    live = live_targets(str(cache), "cpu", sources=wanted.teachers)(pixels, labels)["t"].logits
    assert torch.equal(live, opened.answers(keys)["t"].logits)
    with open_precompute_task(wanted.model_copy(), opened.manifest, 1) as task:
        assert [one.variant for one in task._inputs.teachers] == [Variant(**BOTH)]


def test_the_recipe_takes_auto_or_a_variant() -> None:
    found = recipe(Path("c"), teachers={"t": teacher(speed={"fold": True})}).teachers["t"].speed
    assert found == Variant(fold=True)
    assert json.loads(found.model_dump_json()) == {"channels_last": False, "fold": True}
    with pytest.raises(RecipeError, match="speed"):
        recipe(Path("c"), teachers={"t": teacher(speed="fast")})
