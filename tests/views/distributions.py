"""Samples of planned parameters against those of torchvision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare the columns of two samples [N, P], and the sum and difference of each two columns."""
    for one in range(ours.shape[1]):
        assert stats.ks_2samp(ours[:, one], theirs[:, one]).pvalue > 1e-4, one
        for other in range(one):
            for sign in (1, -1):
                mine, yours = (sample[:, one] + sign * sample[:, other] for sample in (ours, theirs))
                assert stats.ks_2samp(mine, yours).pvalue > 1e-4, (one, other, sign)


def drawn(make_params: Callable[[list[Tensor]], dict[str, Any]], size: tuple[int, int], names: list[str], count: int):
    """Sample the parameters of a torchvision transform."""
    image = torch.empty((1, *size), dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = [make_params([image]) for _ in range(count)]
    return np.array([[sample[name] for name in names] for sample in samples])


def same_counts(ours: list[Any], theirs: list[Any]) -> None:
    """Compare how often two samples take each of a few values."""
    values = sorted({*ours, *theirs}, key=repr)
    table = [[sample.count(value) for value in values] for sample in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def as_often_as(p: float, bits: np.ndarray) -> None:
    """Compare 0s and 1s with a probability, which 0 and 1 mean exactly."""
    assert set(bits.tolist()) <= {0, 1}
    assert stats.binomtest(int(bits.sum()), len(bits), p).pvalue > 1e-4
