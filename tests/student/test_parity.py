"""Training from the cache is training with the teacher: the same losses, the same weights, step for step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import nn

from logitcache.student.losses import Loss
from logitcache.student.losses.base import FeatureLoss
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training import train
from logitcache.teacher.online import live_targets
from tests.student.featured import FEATURES, LOSSES, ON_FEATURES, fill_featured
from tests.student.small import PARTLY, fill, linear, network, recorded_losses, student

STEPS = {"batch_size": 20, "epochs": 5}  # 50 steps over 200 images
NUM_STEPS = 50
SIDE = 16
VIEWS = {
    "num_views": 2,
    "seed": 3,
    "augmentations": [{"kind": "random_crop", "size": SIDE}, {"kind": "horizontal_flip"}],
}
"""Small images: many steps are taken."""

MIXED = VIEWS | {"mixing": [{"kind": "mixup", "p": 0.5}, {"kind": "cutmix", "p": 0.5}]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 logits of one teacher."""
    return fill(tmp_path_factory.mktemp("small") / "cache", views=VIEWS)


def _both(
    cache: Path, modules: Mapping[str, nn.Module], out: Path, **changes: Any
) -> tuple[tuple[RunResult, Any], tuple[RunResult, Any]]:
    """Train from the cache and with the live teachers; returns results and losses by step."""
    with recorded_losses() as cached:
        offline = train(student(out / "cached", cache, **STEPS, **changes))
    with recorded_losses() as live:
        targets = live_targets(str(cache), "cpu", modules=modules)
        online = train(student(out / "online", cache, **STEPS, **changes), live=targets)
    assert len(cached) == len(live) == NUM_STEPS
    return (offline, np.array(cached)), (online, np.array(live))


def _largest_difference(first: RunResult, second: RunResult, file: str = "weights.safetensors") -> float:
    a, b = (load_file(Path(result.out, file)) for result in (first, second))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"kind": "sgd", "lr": 0.05}},
        {"optimizer": {"kind": "adamw"}, "losses": [{"kind": "kl_divergence", "temperature": 4.0}]},
        {"losses": [{"kind": "mean_squared_error", "weight": 0.1}, {"kind": "cross_entropy"}], "ema": 0.9},
        {"losses": [{"kind": "kl_divergence", "standardize": True, "temperature": 2.0}]},
        {"losses": [{"kind": "dkd"}]},
        {"losses": [{"kind": "nkd"}, {"kind": "cross_entropy"}]},
        {"losses": [{"kind": "wsld", "weight": 2.5}, {"kind": "cross_entropy"}]},
        {"losses": [{"kind": "dist", "weight": 2.0}, {"kind": "cross_entropy"}]},
        {"losses": [{"kind": "multi_label_kl", "temperature": 2.0}]},
    ],
    ids=["sgd", "adamw", "squared_error", "standardized", "dkd", "nkd", "wsld", "dist", "multi_label"],
)
def test_fifty_steps_from_the_cache_are_fifty_steps_online(small: Path, tmp_path: Path, changes: Any) -> None:
    (offline, cached), (online, live) = _both(small, {"net": network()}, tmp_path, **changes)
    assert np.abs(cached - live).max() <= 1e-6
    assert _largest_difference(offline, online) <= 1e-6


def test_two_teachers_agree_with_two_live_teachers(tmp_path: Path) -> None:
    losses = [
        {"kind": "kl_divergence", "teacher": "first"},
        {"kind": "kl_divergence", "teacher": "second", "temperature": 2.0, "weight": 0.5},
    ]
    modules = {"first": network(1), "second": network(2)}
    cache = fill(tmp_path / "cache", modules, views=VIEWS)
    (offline, cached), (online, live) = _both(cache, modules, tmp_path, losses=losses)
    assert np.abs(cached - live).max() <= 1e-6
    assert _largest_difference(offline, online) <= 1e-6
    assert offline.teacher_passes == 0
    assert online.teacher_passes == 2 * online.images == 2 * 5 * 200


def test_chosen_outputs_of_a_teacher_are_those_of_the_live_teacher(tmp_path: Path) -> None:
    wide = linear(16, SIDE)
    cache = fill(tmp_path / "cache", {"net": wide}, views=VIEWS, classes=[15, 3, 7, 0, 1, 12, 11, 4, 9, 2])
    losses = [{"kind": "kl_divergence", "temperature": 2.0}, {"kind": "dkd"}]
    (offline, cached), (online, live) = _both(cache, {"net": wide}, tmp_path, losses=losses)
    assert np.abs(cached - live).max() <= 1e-6
    assert _largest_difference(offline, online) <= 1e-6


def test_every_loss_on_features_has_its_parity() -> None:
    union = [loss for loss in get_args(get_args(Loss)[0]) if issubclass(loss, FeatureLoss)]
    assert ON_FEATURES.keys() == {loss.model_fields["kind"].default for loss in union}


@pytest.mark.parametrize(
    ("filled", "changes"),
    [
        ({"views": VIEWS}, {"ema": 0.9}),
        ({"views": MIXED}, {}),
        ({"views": VIEWS, "images": PARTLY}, {"dataset": PARTLY}),
    ],
    ids=["plain", "mixed", "partly labelled"],
)
def test_fifty_steps_on_cached_features_are_fifty_steps_online(tmp_path: Path, filled: Any, changes: Any) -> None:
    cache = fill_featured(tmp_path / "cache", **filled)
    entries = {"losses": LOSSES, "optimizer": {"kind": "sgd", "lr": 0.01}} | changes
    (offline, cached), (online, live) = _both(cache, {"net": network()}, tmp_path, **entries)
    assert np.abs(cached - live).max() <= 1e-6
    for file in ("weights.safetensors", "adapters.safetensors"):
        assert _largest_difference(offline, online, file) <= 1e-6


def test_features_in_int8_are_close_to_online(tmp_path: Path) -> None:
    features = {name: entry | {"dtype": "int8"} for name, entry in FEATURES.items()}
    cache = fill_featured(tmp_path / "cache", features=features, views=VIEWS)
    changes = {"losses": LOSSES, "optimizer": {"kind": "sgd", "lr": 0.01}}
    (_, cached), (_, live) = _both(cache, {"net": network()}, tmp_path, **changes)
    first = np.abs(cached[0] / live[0] - 1)  # later steps start from other weights
    assert 0 < first.max() <= 0.02


def test_float16_is_close_to_online(caches: Path, tmp_path: Path) -> None:
    half = fill(caches / "half", logits={"kind": "dense", "dtype": "float16"})
    changes = {"optimizer": {"kind": "sgd", "lr": 0.05}}
    (offline, cached), (online, live) = _both(half, {"net": network()}, tmp_path, **changes)
    assert 0 < np.abs(cached - live).max() <= 1e-3
    assert _largest_difference(offline, online) <= 1e-2
