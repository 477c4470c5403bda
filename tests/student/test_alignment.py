"""Linear CKA against its definition, and of taps against features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.models import load_model
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.evaluation.alignment import LinearCKA
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import GREY, TEST_IMAGES, fill, network, recipe, student


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of centred Gram matrices (Kornblith et al. 2019, equations 3 and 4)."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def similarity(x: Tensor, y: Tensor, size: int) -> float | None:
    cka = LinearCKA()
    for start in range(0, len(x), size):
        cka.add(x[start : start + size], y[start : start + size])
    return cka.value()


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_give_the_similarity_of_all_rows(size: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) + offset
    y = x[:, :3] @ torch.randn(3, 9, generator=generator, dtype=torch.float64) + offset
    assert similarity(x, y, size) == pytest.approx(by_definition(x.numpy(), y.numpy()), rel=1e-6)


def test_rotated_and_scaled_features_are_the_same() -> None:
    x = torch.randn(40, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert similarity(x, 3 * x @ rotation + 1, 16) == pytest.approx(1.0)


def test_constant_features_have_no_similarity() -> None:
    assert similarity(torch.randn(20, 3), torch.full((20, 2), 0.1), 8) is None


FEATURES = {
    "maps": {"kind": "maps", "tap": "0", "dtype": "float32"},
    "vectors": {"kind": "pooled", "tap": "0.4", "dtype": "float32"},
    "look": {"kind": "attention", "tap": "0"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is measured on a cache with features, of which it has learnt nothing."""
    root = tmp_path_factory.mktemp("alignment")
    fill(root / "test", views={}, images=TEST_IMAGES, features=FEATURES)
    validation = {"cache": str(root / "test"), "batch_size": 30}
    train(student(root / "run", fill(root / "train"), epochs=1, validation=validation))
    return root / "run"


def at(module: nn.Module, tap: str, pixels: Tensor) -> np.ndarray:
    """What a network has at a tap, as a mean over places, by another way."""
    found = []
    hook = module.get_submodule(tap).register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        module.eval()(pixels)
    hook.remove()
    values = found[0].double()
    return np.asarray(values.mean(dim=(2, 3)) if values.ndim == 4 else values)


def test_every_tap_is_compared_with_every_feature_that_is_a_vector_by_its_means(run: Path) -> None:
    found = evaluate(run, ["validation.taps=['0.0', '3']"]).cka
    assert [(row.tap, row.teacher, row.feature) for row in found] == [
        ("0.0", "net", "maps"),
        ("0.0", "net", "vectors"),
        ("3", "net", "maps"),
        ("3", "net", "vectors"),
    ]
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    pixels = torch.stack([images.read(index) for index in range(100)]) / 255
    mine = [at(load_model(run).module, tap, (pixels - 0.5) / 0.5) for tap in ("0.0", "3")]
    theirs = [at(network(), tap, (pixels - 0.3) / 0.3) for tap in ("0", "0.4")]
    expected = [by_definition(x, y) for x in mine for y in theirs]
    assert [row.cka for row in found] == pytest.approx(expected, rel=1e-4)


def test_taps_that_the_losses_looked_at_are_compared_unasked(tmp_path: Path, run: Path) -> None:
    cache = fill(tmp_path / "train", features={"maps": FEATURES["maps"]})
    losses = [{"kind": "hint", "student": "0", "feature": "maps"}]
    validation = {"cache": str(run.parent / "test")}
    train(student(tmp_path / "run", cache, epochs=1, losses=losses, validation=validation))
    assert {row.tap for row in evaluate(tmp_path / "run").cka} == {"0"}


def test_measuring_alone_compares_no_taps(run: Path) -> None:
    assert evaluate(run).cka == ()


def test_a_tap_that_is_not_there_is_refused(run: Path) -> None:
    with pytest.raises(RecipeError, match="no module 'head'"):
        evaluate(run, ["validation.taps=[head]"])


def test_a_cache_of_features_alone_is_compared_with_by_them_alone(run: Path, tmp_path: Path) -> None:
    entry = {"preprocessing": GREY.model_dump(mode="json"), "logits": None, "features": {"maps": FEATURES["maps"]}}
    cache = str(tmp_path / "features")
    plan = recipe(PrecomputeRecipe, cache=cache, dataset=TEST_IMAGES, teachers={"net": entry}, num_workers=0)
    precompute(plan, teachers={"net": network()})
    result = evaluate(run, [f"validation.cache={cache}", "validation.taps=['3']"])
    assert (result.measures.agreement, result.measures.teacher_top1, result.retention) == (None, None, None)
    assert [(row.tap, row.feature) for row in result.cka] == [("3", "maps")]
