"""Binary cross-entropy against its formula in NumPy, label by label."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.student.losses import BinaryCrossEntropy, binary_cross_entropy
from logitcache.student.losses.base import Context, Site
from logitcache.student.optim.schedules import Progress
from logitcache.targets import Batch, MixedLabels, Targets

ROWS, CLASSES = 9, 5
WEIGHTS = (0.5, 1.0, 2.0, 7.0, 1.0)
LOSSES = [BinaryCrossEntropy(), BinaryCrossEntropy(positive_weight=3.0), BinaryCrossEntropy(positive_weight=WEIGHTS)]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=["plain", "one weight", "weights"])


def _random(seed: int, scale: float = 3.0, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * scale


def _labels(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randint(-1, 2, (rows, CLASSES), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


INPUTS = {
    "random": _random(0),
    "wide": _random(1, 60.0),
    "extreme": _random(2).sign() * 1e4,
    "constant": torch.zeros(ROWS, CLASSES),
    "one row": _random(3, rows=1),
}


def _batch(labels: Tensor, mixed: MixedLabels | None = None) -> Batch:
    return Batch(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, torch.zeros(len(labels), 2), {}, mixed)


def _value(loss: BinaryCrossEntropy, logits: Tensor, batch: Batch) -> Tensor:
    adapter = loss.adapter(Site({}, {}, ROWS, torch.ones(CLASSES, dtype=torch.long)))
    return loss(Targets(logits), batch, Context(adapter, Progress(0, 1, 1)))


def _expected(loss: BinaryCrossEntropy, logits: Tensor, batch: Batch) -> float:
    weights = np.broadcast_to(np.array(loss.positive_weight, np.float64), CLASSES)
    terms = []
    for (row, column), z in np.ndenumerate(logits.double().numpy()):
        wanted: Any = int(batch.labels[row, column])
        if batch.mixed is not None:
            partner, share = int(batch.mixed.partners[row, column]), float(batch.mixed.share[row])
            wanted = -1 if -1 in (wanted, partner) else share * wanted + (1 - share) * partner
        if wanted >= 0:
            terms.append(weights[column] * wanted * np.logaddexp(0, -z) + (1 - wanted) * np.logaddexp(0, z))
    return float(np.mean(terms)) if terms else 0.0


@every_loss
@pytest.mark.parametrize("name", INPUTS)
def test_the_loss_is_its_formula(loss: BinaryCrossEntropy, name: str) -> None:
    logits = INPUTS[name].clone().requires_grad_()
    batch = _batch(_labels(4, len(logits)))
    value = _value(loss, logits, batch)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.item(), _expected(loss, INPUTS[name], batch), rtol=1e-5, atol=1e-6)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[batch.labels < 0] == 0).all()


@every_loss
def test_mixed_labels_are_the_mean_of_both_by_their_shares(loss: BinaryCrossEntropy) -> None:
    batch = _batch(_labels(5), MixedLabels(_labels(6), torch.linspace(0.1, 1.0, ROWS)))
    value = _value(loss, INPUTS["random"], batch)
    np.testing.assert_allclose(value.item(), _expected(loss, INPUTS["random"], batch), rtol=1e-5)


@every_loss
def test_the_gradient_is_that_of_the_value(loss: BinaryCrossEntropy) -> None:
    batch = _batch(_labels(7), MixedLabels(_labels(8), torch.full((ROWS,), 0.3)))
    weight = torch.as_tensor(loss.positive_weight, dtype=torch.float64)

    def value(logits: Tensor) -> Tensor:
        return binary_cross_entropy(logits, batch.labels, weight, batch.mixed)

    assert torch.autograd.gradcheck(value, INPUTS["random"].double().requires_grad_())


@every_loss
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_a_batch_sum_to_the_whole(loss: BinaryCrossEntropy, size: int) -> None:
    whole = _batch(_labels(9), MixedLabels(_labels(10), torch.linspace(0, 1, ROWS)))
    total = torch.zeros(())
    for start in range(0, ROWS, size):
        part = whole[start : start + size]
        total += _value(loss, INPUTS["random"][start : start + size], part) * loss.rows(part) / loss.rows(whole)
    np.testing.assert_allclose(total.item(), _value(loss, INPUTS["random"], whole).item(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    logits, batch = INPUTS["random"].to(dtype), _batch(_labels(11))
    with torch.autocast("cpu", torch.bfloat16):
        value = _value(LOSSES[2], logits, batch)
    assert value.dtype == torch.float32
    assert value.item() == _value(LOSSES[2], logits.float(), batch).item()


def test_answers_that_are_sure_and_right_cost_nothing_and_no_labels_cost_nothing() -> None:
    labels = _labels(12)
    assert _value(LOSSES[2], (2.0 * labels - 1) * 1e4, _batch(labels)).item() == 0
    assert _value(LOSSES[2], INPUTS["random"], _batch(torch.full_like(labels, -1))).item() == 0


def test_weights_are_one_for_each_class() -> None:
    site = Site({}, {}, ROWS, torch.ones(3, dtype=torch.long))
    with pytest.raises(RecipeError, match=r"positive_weight has 5 numbers for 3 classes\. Fix: one for each"):
        LOSSES[2].adapter(site)
    for wrong in (0, -1.0, (), (1.0, 0.0)):
        with pytest.raises(ValidationError):
            BinaryCrossEntropy(positive_weight=wrong)
