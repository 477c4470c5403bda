"""The bound beside which encodings.py puts the transform, and the pairs of images of encoding_accuracy.py."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.cache.encodings.basis import fit_basis
from logitcache.cache.encodings.transform import Transform

ROOT = Path(__file__).parents[2]


def script(name: str) -> Iterator[ModuleType]:
    """Import a benchmark, which is a script and imports others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def bound() -> Iterator[ModuleType]:
    yield from script("_rate_distortion")


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    yield from script("encoding_accuracy")


def rates(variances: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bits of Gaussians [C] whose errors are [..., C]."""
    return np.maximum(np.log2(variances / errors), 0.0).sum(axis=-1) / 2


@given(st.floats(0.05, 20.0), st.floats(0.05, 20.0), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_bound_is_the_least_rate_of_all_splits_of_the_error(
    bound: ModuleType, first: float, second: float, share: float
) -> None:
    variances = np.array([first, second])
    distortion = share * variances.sum()
    splits = np.linspace(0.0, distortion, 20_003)[1:-1]
    least = rates(variances, np.stack([splits, distortion - splits], axis=1)).min()
    assert bound.gaussian_bound(variances, distortion).bits == pytest.approx(least, abs=1e-3)


def test_no_split_of_the_error_over_many_components_is_below_the_bound(bound: ModuleType) -> None:
    generator = np.random.default_rng(0)
    variances = generator.exponential(size=9)
    least = bound.gaussian_bound(variances, 2.0).bits
    assert (rates(variances, 2.0 * generator.dirichlet(np.ones(9), size=5000)) >= least).all()


def test_bound_gives_no_bits_to_components_below_the_level(bound: ModuleType) -> None:
    # The level is 1: two components of 4 take log2(4) / 2 = 1 bit each, one of 1/2 takes none.
    assert bound.gaussian_bound(np.array([4.0, 0.5, 4.0]), 2.5) == (pytest.approx(2.0), 2)
    assert bound.gaussian_bound(np.array([1.0, 2.0]), 3.0) == (0.0, 0)


def test_transform_of_gaussian_logits_is_not_below_the_bound(bound: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 12, generator=generator) * torch.linspace(4.0, 1.0, 12)
    calibration, judged = logits[:3000], logits[3000:]
    basis, step = fit_basis(calibration), 1.0
    fitted = Transform(step=step, corrections=0).with_basis(basis, calibration)
    errors = bound.companded_errors(fitted, basis, judged)
    num_coefficients = fitted.form.num_coefficients
    # A trellis errs by less than rounding to steps does, step² / 12 a coefficient, and by more than half of that.
    assert 0.5 < errors.distortion / (num_coefficients * step**2 / 12) < 1.0
    row = bound.above_bound(step, 8.0 * num_coefficients, [fitted], [basis], [judged])
    assert row["judged_active"] == num_coefficients
    assert row["judged_excess"] == pytest.approx((8.0 * num_coefficients - row["judged_bits"]) / num_coefficients)
    variance = errors.moments[:num_coefficients]
    level = errors.distortion / num_coefficients
    assert row["judged_bits"] == pytest.approx(np.log2(variance / level).sum() / 2, rel=0.02)


def test_pairs_hold_both_images_and_their_joint_class(accuracy: ModuleType) -> None:
    pairs = accuracy.Pairs("test", None, 30, 5)
    with np.load(ROOT / "data" / "fashion_mnist" / "test.npz") as stored:
        single = {image.tobytes(): int(label) for image, label in zip(stored["images"], stored["labels"], strict=True)}
    for index in range(len(pairs)):
        image, label = pairs[index]
        first, second, nothing = image.numpy()
        assert divmod(label, 10) == (single[first.tobytes()], single[second.tobytes()])
        assert not nothing.any()
    again, other = (accuracy.Pairs("test", None, 30, seed).images for seed in (5, 6))
    assert torch.equal(again, pairs.images)
    assert not torch.equal(other, pairs.images)


def test_every_encoding_has_a_row_that_the_cache_can_hold(accuracy: ModuleType) -> None:
    assert set(accuracy.ENCODINGS) >= {"dense", "uint8", "transform-0.8", "top-10", "top-100"}
    assert accuracy.chosen_rows is importlib.import_module("_study").chosen_rows
