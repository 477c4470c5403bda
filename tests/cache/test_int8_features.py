"""Features in bytes: whatever their magnitude, half a level is the most that they err by."""

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.cache.encodings.features import FeatureForm, FittedFeature
from logitcache.reductions import FeatureKind
from logitcache.targets import feature_values

FORM = FeatureForm(dtype="int8", storage="packed")
SHAPES: list[tuple[FeatureKind, tuple[int, ...]]] = [
    ("pooled", (12,)),
    ("maps", (3, 5, 4)),
    ("maps", (6, 7)),
    ("attention", (5,)),
    ("grad_cam", (4, 4)),
]


def error_in_levels(values: Tensor, kind: FeatureKind) -> float:
    """Return the largest error, as a part of what the largest number of the same scale is over 127."""
    codec = FittedFeature(FORM, {}, kind, tuple(values.shape[1:]))
    stored = codec.encode(values)
    arrays = FORM.arrays(kind, tuple(values.shape[1:]))
    assert {array.suffix: (len(values), *array.shape) for array in arrays} == {k: v.shape for k, v in stored.items()}
    assert {array.suffix: array.dtype for array in arrays} == {k: str(v.dtype)[6:] for k, v in stored.items()}
    found, exact = feature_values(codec.decode(stored)).double().numpy(), values.double().numpy()
    axes = tuple(range(1 if values.ndim == 2 else 2, values.ndim))
    level = np.abs(exact).max(axis=axes, keepdims=True) / 127
    return float((np.abs(found - exact) / level).max())


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=lambda value: str(value))
def test_every_magnitude_keeps_its_digits(kind: FeatureKind, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-30, 31):
        values = torch.randn(20, *shape, generator=generator) * 10.0**exponent
        assert error_in_levels(values, kind) <= 0.5001, exponent


def test_rows_of_all_magnitudes_lie_beside_each_other() -> None:
    magnitudes = 10.0 ** torch.arange(-30, 31).float()
    values = torch.randn(61, 8, generator=torch.Generator().manual_seed(1)) * magnitudes[:, None]
    assert error_in_levels(values, "pooled") <= 0.5001


def test_zeros_stay_zeros_and_what_is_below_normal_floats_becomes_zero() -> None:
    values = torch.tensor([[0.0, 0.0], [1e-42, -1e-44], [3.4e38, -3.4e38], [1.0, 0.0]])
    codec = FittedFeature(FORM, {}, "pooled", (2,))
    found = feature_values(codec.decode(codec.encode(values)))
    assert torch.allclose(found, torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.4e38, -3.4e38], [1.0, 0.0]]), rtol=1e-6)
