"""Choosing an encoding by its measured error, and the measuring itself."""

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.cache.encodings.auto import Auto
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.measure import ErrorMeter, divergences, measure, stored_bytes
from logitcache.cache.encodings.top_k import PackedTopK
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.errors import RecipeError

NUM_CLASSES = 60


def teacher_logits(count: int, seed: int = 0) -> Tensor:
    """Make the logits [count, 60] of a linear head over features that are never negative, and little noise."""
    head = torch.randn(24, NUM_CLASSES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 24, generator=generator).exp() * torch.linspace(1, 0.1, 24)
    return features @ head + 0.2 * torch.randn(count, NUM_CLASSES, generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_divergences_are_those_of_the_definition(temperature: float, noise: float) -> None:
    logits = teacher_logits(50)
    other = logits + noise * torch.randn(50, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    log_p, log_q = (torch.log_softmax(values.double() / temperature, dim=1) for values in (logits, other))
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    found = divergences(logits, other, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1e-10)


def test_the_meter_adds_batches_up() -> None:
    logits, other = teacher_logits(2000), teacher_logits(2000, seed=1)
    meter = ErrorMeter([1.0, 2.0])
    for start, stop in ((0, 3), (3, 900), (900, 2000)):
        meter.add(logits[start:stop], other[start:stop])
    for errors in meter.errors():
        rows = divergences(logits, other, errors.temperature).numpy()
        assert errors.mean == pytest.approx(rows.mean(), rel=1e-5)
        assert errors.max == pytest.approx(rows.max())
        assert np.count_nonzero(rows > errors.p999) == 2


def test_stored_bytes_are_compressed_ones() -> None:
    same = torch.zeros(500, NUM_CLASSES)
    assert sum(row.num_bytes for row in UInt8().arrays(NUM_CLASSES)) == NUM_CLASSES + 4
    assert stored_bytes(UInt8(), same) < 1
    assert stored_bytes(Dense(dtype="float32"), torch.randn(500, NUM_CLASSES)) > 0.8 * 4 * NUM_CLASSES


@pytest.mark.parametrize(("max_kl", "temperature"), [(0.2, 1.0), (1e-3, 4.0)])
def test_the_choice_keeps_to_the_budget_on_rows_that_it_never_saw(max_kl: float, temperature: float) -> None:
    calibration, others = teacher_logits(400), teacher_logits(300, seed=5)
    auto = Auto(max_kl=max_kl, temperature=temperature)
    chosen = auto.choose(calibration)[0]
    assert chosen.errors.mean <= max_kl
    fitted = auto.fit(calibration)
    (errors,) = measure(fitted, others, [temperature])
    assert errors.mean <= 1.5 * max_kl
    # No packed top-k that keeps to the budget on the rows held out is smaller there.
    held_out = calibration[3::4]
    for k in range(1, NUM_CLASSES, 4):
        rival = PackedTopK(k=k)
        if measure(rival, held_out, [temperature])[0].mean <= max_kl:
            assert chosen.num_bytes <= stored_bytes(rival, held_out)


def test_choices_come_smallest_first_and_all_within_the_budget() -> None:
    choices = Auto(max_kl=1e-2).choose(teacher_logits(400))
    sizes = [choice.num_bytes for choice in choices]
    assert len(choices) >= 4
    assert sizes == sorted(sizes)
    assert all(choice.errors.mean <= 1e-2 for choice in choices)


def test_few_rows_pay_for_the_tables() -> None:
    logits = teacher_logits(400)
    kinds = [Auto(max_kl=0.01).choose(logits, num_rows=rows)[0].encoding.kind for rows in (100, 10**6)]
    assert kinds[0] != "transform"
    assert kinds[1] == "transform"


def test_too_few_images_are_refused() -> None:
    with pytest.raises(RecipeError, match="3 images"):
        Auto(max_kl=0.1).choose(teacher_logits(12), images=torch.arange(12) % 3)


def test_a_budget_of_almost_nothing_takes_the_logits_as_they_are() -> None:
    assert Auto(max_kl=1e-30).fit(teacher_logits(40)) == Dense(dtype="float32", storage="packed")


def test_far_distributions_have_a_finite_divergence() -> None:
    near, far = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    assert float(divergences(near, far, 1.0)) == pytest.approx(400.0)
