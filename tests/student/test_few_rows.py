"""From how many rows on a loss that compares rows of a batch has anything to say."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from logitcache.student import losses

COMPARING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dist": partial(losses.dist, beta=0.0),  # without its comparison of classes within a row
    "similarity": losses.similarity,
    "rkd": losses.rkd,
    "pkt": losses.pkt,
    "cka": losses.cka,
}
MEMBERS = {loss.model_fields["kind"].default: loss for loss in get_args(get_args(losses.Loss)[0])}


def test_losses_that_are_no_mean_over_rows_need_some_to_compare() -> None:
    assert {kind for kind, loss in MEMBERS.items() if not loss.by_row} == COMPARING.keys()
    assert {kind for kind, loss in MEMBERS.items() if loss.min_rows > 1} == COMPARING.keys()


def _gradient(kind: str, rows: int) -> float:
    """The mean norm of the gradient of twenty batches of so many rows."""
    generator, norms = torch.Generator().manual_seed(0), []
    for _ in range(20):
        student, teacher = torch.randn(2, rows, 5, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad(COMPARING[kind](student.requires_grad_(), teacher), student)
        norms.append(float(gradient.norm()))
    return sum(norms) / len(norms)


@pytest.mark.parametrize("kind", COMPARING)
def test_fewer_rows_teach_nothing_and_as_many_do(kind: str) -> None:
    count = MEMBERS[kind].min_rows
    fewer = [_gradient(kind, rows) for rows in range(1, count)]
    assert max(fewer) < 0.01 * _gradient(kind, count)
