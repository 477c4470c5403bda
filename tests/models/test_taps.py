"""Taps catch what modules put out and take in, with gradients, and nothing when nobody asks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logitcache.errors import RecipeError
from logitcache.models.taps.taps import Tapped


class Block(nn.Module):
    def __init__(self, saves_memory: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.saves_memory = saves_memory

    def forward(self, values: Tensor) -> Tensor:
        if self.saves_memory:
            return checkpoint(self.body, values, use_reentrant=False)  # type: ignore[no-any-return]
        return self.body(values)

    def body(self, values: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(values))))


def network(saves_memory: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Block(saves_memory), nn.Linear(4, 3))


def test_outputs_and_inputs_are_what_modules_see() -> None:
    net, values = network(), torch.randn(5, 4)
    output, found = Tapped(net, net, ["0.first", "1:input", "1"], "the model")(values)
    block = net[0]
    assert torch.equal(found["0.first"], block.first(values))
    assert torch.equal(found["1:input"], block(values))
    assert torch.equal(found["1"], output)
    assert torch.equal(output, net(values))


def test_a_pass_that_nobody_asked_for_is_not_caught_and_hooks_come_off() -> None:
    net = network()
    tapped = Tapped(net, net, ["0.first", "1:input"], "the model")
    net(torch.randn(2, 4))
    assert len(tapped(torch.randn(3, 4))[1]["0.first"]) == 3
    tapped.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with pytest.raises(RecipeError, match="did not fire"):
        tapped(torch.randn(3, 4))


def gradients(saves_memory: bool) -> list[Tensor]:
    net = network(saves_memory)
    output, found = Tapped(net, net, ["0.first", "0"], "the model")(torch.linspace(-1, 1, 20).view(5, 4))
    loss = output.square().sum() + found["0.first"].square().sum() + found["0"].abs().sum()
    loss.backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def test_taps_inside_activation_checkpointing_have_the_same_gradients() -> None:
    plain, saved = gradients(False), gradients(True)
    assert len(plain) == len(saved) == 6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, saved, strict=True))


class Pair(nn.Module):
    def forward(self, values: Tensor) -> Any:
        return values, values


def test_what_is_no_tensor_is_refused_by_name() -> None:
    net = nn.Sequential(Pair())
    with pytest.raises(RecipeError, match="the student: the tap '0' holds a tuple, not a tensor"):
        Tapped(net, net, ["0"], "the student")(torch.randn(2, 4))


@pytest.mark.parametrize("tap", ["", ":input", "0.third", "2"])
def test_a_path_that_is_not_there_is_refused_with_those_that_are(tap: str) -> None:
    net = network()
    with pytest.raises(RecipeError, match=r"has no module .*\n.*its modules: 0, 0\.first, 0\.second, 1"):
        Tapped(net, net, [tap], "the student")
