"""The moving average: what it averages, what it copies, and by which formula."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from logitcache.student.optim.averaging import EMA
from logitcache.student.training import train
from tests.student.small import student

STEPS = 40


class Codebook(nn.Module):
    """A floating buffer that is a state of the model, not a statistic, and one that is never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, 4))
        self.register_buffer("usage", torch.zeros(3), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.codes.mul_(0.5).add_(features.mean(dim=0)).neg_()
                self.usage.add_(1.5)
        return features + self.codes.sum(dim=0) * 0.01


def _old_style() -> nn.Module:
    return spectral_norm(nn.Linear(6, 4))


def _parametrized() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(6, 4))


def _both(normalized: nn.Module) -> nn.Sequential:
    return nn.Sequential(normalized, nn.BatchNorm1d(4), Codebook(), nn.Linear(4, 3))


def _trained(model: nn.Module, ema: EMA, rate: float = 0.5) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return the average, and the model's state after each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    average, states = ema.start(model), []
    for step in range(STEPS):
        model.train()(torch.randn(16, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(average, model, step)
        states.append({name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())})
    return average.module, states


@pytest.mark.parametrize("build", [_old_style, _parametrized])
@pytest.mark.parametrize("warmup", [True, False])
def test_parameters_and_statistics_are_averaged_and_every_other_buffer_is_copied(build, warmup):
    torch.manual_seed(0)
    average, states = _trained(_both(build()), EMA(decay=0.9, warmup=warmup))
    expected = {name: value.double() for name, value in states[0].items()}
    for step, state in list(enumerate(states))[1:]:
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    averaged = {name for name, _ in average.named_parameters()} | {"1.running_mean", "1.running_var"}
    found = dict([*average.named_parameters(), *average.named_buffers()])
    assert {"1.num_batches_tracked", "2.codes", "2.usage"} <= found.keys() - averaged
    for name, value in found.items():
        if name in averaged:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, states[-1][name]), name


@pytest.mark.parametrize("build", [_old_style, _parametrized])
def test_a_spectrally_normalised_average_has_the_norm_of_its_own_weights(build):
    """Averaged singular vectors have norms below 1: they made logits 1.63 times too large."""
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Linear(4, 3))
    average, _ = _trained(model, EMA(decay=0.9), rate=0.05)
    average.eval()(torch.zeros(1, 6))
    weight = average[0].weight.detach()
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=0.05)


def test_statistics_of_any_normalisation_are_averaged():
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
    model.append(nn.Linear(6, 2))
    average, states = _trained(model, EMA(decay=0.5, warmup=False))
    mean = states[0]["1.running_mean"]
    for state in states[1:]:
        mean = (mean + state["1.running_mean"]) / 2
    torch.testing.assert_close(average.get_buffer("1.running_mean"), mean)


def test_a_number_is_a_decay_with_warmup_and_trains_as_such(tmp_path: Path, cache: Path) -> None:
    number = student(tmp_path / "number", cache, ema=0.9)
    assert number.ema == EMA(decay=0.9) == EMA(decay=0.9, warmup=True)
    train(number)
    weights = {}
    for name, ema in {"number": 0.9, "entry": {"decay": 0.9}, "cold": {"decay": 0.9, "warmup": False}}.items():
        train(student(tmp_path / name, cache, ema=ema), resume=True)
        weights[name] = (tmp_path / name / "weights.safetensors").read_bytes()
    assert weights["number"] == weights["entry"] != weights["cold"]


@pytest.mark.parametrize("ema", [0.0, 1.0, True, "much", {"decay": 2}, {"warmup": True}, {"decay": 0.9, "power": 1}])
def test_other_averages_are_refused(tmp_path: Path, ema: object) -> None:
    with pytest.raises(ValidationError, match="ema"):
        student(tmp_path, tmp_path, ema=ema)
