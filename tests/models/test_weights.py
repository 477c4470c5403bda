"""Digests of weights."""

import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import (
    SmallCNN,
    weights_digest,
)


def test_every_weight_and_buffer_counts_in_the_digest() -> None:
    module = SmallCNN(width=2).build(3, 1).module
    seen = {weights_digest(module)}
    for value in module.state_dict().values():
        flat = value.view(-1)
        flat[-1] += 1
        seen.add(weights_digest(module))
    assert len(seen) == len(module.state_dict()) + 1


def test_the_digest_is_of_names_dtypes_and_shapes_too() -> None:
    digests = {
        weights_digest(module)
        for module in (
            nn.ParameterDict({"a": torch.zeros(4)}),
            nn.ParameterDict({"b": torch.zeros(4)}),
            nn.ParameterDict({"a": torch.zeros(2, 2)}),
            nn.ParameterDict({"a": torch.zeros(4, dtype=torch.bfloat16)}),
            nn.ParameterDict({"a": torch.zeros(2, dtype=torch.float64)}),
        )
    }
    assert len(digests) == 5


def test_memory_format_and_training_mode_do_not_change_the_digest() -> None:
    module = SmallCNN().build(3, 3).module
    before = weights_digest(module)
    assert weights_digest(module.to(memory_format=torch.channels_last).eval()) == before


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from logitcache.models import SmallCNN, weights_digest;"
        "torch.manual_seed(5); print(weights_digest(SmallCNN(width=3).build(4, 2).module))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    torch.manual_seed(5)
    assert done.stdout.strip() == weights_digest(SmallCNN(width=3).build(4, 2).module)


def test_a_state_that_is_no_tensor_cannot_be_digested() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return io.BytesIO()

    with pytest.raises(RecipeError, match="_extra_state"):
        weights_digest(Extra())
