"""The errors that are recorded of features, against float64."""

import pytest
import torch

from logitcache.teacher.encoding import relative_error


@pytest.mark.parametrize("exponent", [-30, -25, -10, 0, 10, 25, 30])
def test_errors_of_features_do_not_depend_on_their_magnitude(exponent: int) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(9, 3, 4, generator=generator) * 10.0**exponent
    found = exact * (1 + 0.01 * torch.randn(9, 3, 4, generator=generator))
    wanted = (found.double() - exact.double()).square().sum((1, 2)) / exact.double().square().sum((1, 2))
    assert torch.allclose(relative_error(found, exact).double(), wanted, rtol=1e-4)


def test_zeros_that_come_back_have_no_error_and_others_a_large_one() -> None:
    error = relative_error(torch.tensor([[0.0, 0.0], [0.0, 1e-3]]), torch.zeros(2, 2))
    assert error[0] == 0.0
    assert 1e20 < float(error[1]) < float("inf")
