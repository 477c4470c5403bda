"""The live teacher answers as the cache does, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.logits import TopKLogits
from logitcache.models import Checkpoint, Custom, Preprocessing, SmallCNN, save_weights
from logitcache.models.small_cnn import small_cnn
from logitcache.stage_one.precompute import precompute
from logitcache.student.live_teacher import LiveTeacher
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import DENSE32, TOP2, Linear, Pixels, forge, recipe, run, teacher

IMAGES = Pixels(40, side=8)
HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


def linear() -> Linear:
    """Stand in for a user's own factory."""
    return Linear(side=8)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """A cache of a linear teacher that was given as an object."""
    run(tmp_path / "c.zarr", IMAGES, linear(), teachers={"t": teacher(DENSE32)}, views={"num_views": 2, "seed": 1})
    return str(tmp_path / "c.zarr")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save_weights(tmp_path / "w.safetensors", small_cnn(4, 1, 5, 3))
    return str(tmp_path / "w.safetensors")


def checkpoint(path: str) -> Checkpoint:
    return Checkpoint(path=path, model=SmallCNN(width=4), num_classes=5)


def differences(path: str, live: Callable[..., Any]) -> float:
    opened = open_cache(path)
    views = opened.views(IMAGES)
    keys = [ViewKey(view, index) for view in range(2) for index in range(40)]
    cached = opened.rows(keys)["t"].logits
    labels = torch.from_numpy(views.dataset.labels[[key.index for key in keys]])
    answered = live(views.__getitems__(keys), labels)["t"].logits
    assert isinstance(cached, torch.Tensor)
    return float((cached - answered).abs().max())


def test_a_module_answers_as_the_cache(cache: str) -> None:
    assert differences(cache, live_targets(cache, "cpu", modules={"t": linear()})) <= 1e-6


def test_a_source_of_the_users_own_code_answers_as_the_cache(cache: str) -> None:
    source = LiveTeacher(model=Custom(factory="tests.teacher.test_online:linear"))
    assert differences(cache, live_targets(cache, "cpu", {"t": source})) <= 1e-6


def test_a_recorded_model_is_built_again(weights: str, tmp_path: Path) -> None:
    entry = teacher(DENSE32, model=checkpoint(weights).model_dump(mode="json"))
    precompute(recipe(tmp_path / "c.zarr", teachers={"t": entry}, views={"num_views": 2}), dataset=IMAGES)
    assert differences(str(tmp_path / "c.zarr"), live_targets(str(tmp_path / "c.zarr"), "cpu")) <= 1e-6
    # Other weights in the same file are another teacher.
    save_weights(Path(weights), small_cnn(4, 1, 5, 3))
    with pytest.raises(MismatchError, match=r"teachers.t.weights: the cache has '[0-9a-f]{64}', the live teacher"):
        live_targets(str(tmp_path / "c.zarr"), "cpu")


def test_other_weights_are_refused(cache: str) -> None:
    module = linear()
    with torch.no_grad():
        module.weight[3, 3] += 1e-6
    with pytest.raises(MismatchError, match=r"teachers.t.weights: the cache has .* Fix: give the teacher") as caught:
        live_targets(cache, "cpu", modules={"t": module})
    assert caught.value.exit_code == 4


def test_another_normalisation_is_refused(cache: str) -> None:
    source = LiveTeacher(
        model=Custom(factory="tests.teacher.test_online:linear"),
        preprocessing=HALF.model_copy(update={"mean": (0.4, 0.5, 0.5)}),
    )
    with pytest.raises(MismatchError, match=r"teachers.t.preprocessing: the cache has .*0\.5.* live teacher .*0\.4"):
        live_targets(cache, "cpu", {"t": source})


def test_a_teacher_that_was_an_object_must_be_given_again(cache: str) -> None:
    with pytest.raises(RecipeError, match="never names code to run"):
        live_targets(cache, "cpu")


def test_a_name_that_is_not_in_the_cache_is_refused(cache: str) -> None:
    with pytest.raises(RecipeError, match=r"teachers \['u'\] are not in"):
        live_targets(cache, "cpu", {"u": LiveTeacher(model=SmallCNN())})


HOSTILE: dict[str, Any] = {
    "factory": {"kind": "custom", "factory": "os:abort", "arguments": {}},
    "factory inside": {"kind": "checkpoint", "path": "w", "model": {"kind": "custom", "factory": "os:abort"}},
    "factory of a run": {"kind": "run", "path": "runs/x", "factory": "os:abort"},
    "unknown kind": {"kind": "pickle", "path": "x"},
    "a number": 7,
    "a list": [{"kind": "custom", "factory": "os:abort"}],
    "nothing": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recorded_model_never_runs_code(name: str, cache: str) -> None:
    forge(Path(cache), lambda manifest: manifest["teachers"]["t"].update(model=HOSTILE[name]))
    with pytest.raises((RecipeError, CacheError), match=r"teachers: \{t: …\}"):
        live_targets(cache, "cpu")


def test_a_live_teacher_gives_full_logits_where_the_cache_keeps_a_few(tmp_path: Path) -> None:
    path = str(tmp_path / "c.zarr")
    run(Path(path), IMAGES, linear(), teachers={"t": teacher(TOP2)}, views={"num_views": 1})
    opened = open_cache(path)
    pixels = opened.views(IMAGES).__getitems__([ViewKey(0, 3)])
    live = live_targets(path, "cpu", modules={"t": linear()})(pixels, torch.tensor([-1]))["t"].logits
    cached = opened.rows([ViewKey(0, 3)])["t"].compact
    assert isinstance(cached, TopKLogits)
    top = torch.log_softmax(live, dim=1).topk(2)
    np.testing.assert_allclose(cached.log_p.numpy(), top.values.numpy(), atol=2e-3)
    assert np.array_equal(cached.index.numpy(), top.indices.numpy())
