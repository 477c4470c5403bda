"""Batch normalisation over several processes: what can be said of it without CUDA devices."""

from pathlib import Path

import pytest
import torch
from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import SmallCNN
from logitcache.student.distributed.ranks import ALONE, Ranks
from logitcache.student.optim.batch_norm import require_shared_statistics, synchronize, warn_of_unsettled
from logitcache.student.training import train
from tests.student.ranks import train_together
from tests.student.small import student, weights

TWO = Ranks(0, 2)


class WithActivation(nn.BatchNorm2d):
    """As networks of some libraries have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_layers_are_replaced_under_the_same_names_with_the_same_state_and_answers() -> None:
    torch.manual_seed(0)
    model, pixels = SmallCNN(width=4).build(10, 1).module, torch.rand(8, 1, 28, 28)
    model(pixels)  # statistics that are not those of the start
    state, optimized = {name: value.clone() for name, value in model.state_dict().items()}, list(model.parameters())
    expected = model.eval()(pixels)
    synchronize(model, TWO)
    kinds = {type(module) for module in model.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(one is other for one, other in zip(model.parameters(), optimized, strict=True))
    assert torch.equal(model(pixels), expected)


def test_one_process_keeps_its_layers_and_learns_the_same(cache: Path, tmp_path: Path) -> None:
    model = SmallCNN(width=4).build(10, 1).module
    synchronize(model, ALONE)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    plain = train(student(tmp_path / "plain", cache, epochs=1))
    assert weights(train(student(tmp_path / "synced", cache, epochs=1, sync_batch_norm=True))) == weights(plain)


def test_layers_that_do_more_are_named_and_stay_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(WithActivation(1)))
    with pytest.raises(RecipeError, match=r"others that normalise by batch: \{'1\.0': 'WithActivation'\}\. Fix: "):
        synchronize(model, TWO)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_without_cuda_are_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    ended = train_together(2, student(tmp_path / "run", cache, sync_batch_norm=True))
    assert [code for code, _ in ended] == [2, 2]
    text = "these 2 processes are on device 'cpu'. Fix: sync_batch_norm: false"
    assert sum(text in shown for _, shown in ended) == 1
    assert not (tmp_path / "run").exists()
    require_shared_statistics(torch.device("cuda", 0), TWO)
    require_shared_statistics(torch.device("cpu"), ALONE)


def test_gradients_within_a_synchronized_model_are_refused(cache: Path, tmp_path: Path) -> None:
    losses = [{"kind": "grad_cam", "student": "0", "feature": "cam"}]
    with pytest.raises(ValueError, match=r"\['grad_cam'\] take gradients inside the model, and torch.nn.SyncBatchNorm"):
        student(tmp_path / "run", cache, losses=losses, sync_batch_norm=True)


@pytest.mark.parametrize(("momentum", "steps"), [(0.01, 60), (0.01, 400), (0.1, 10), (0.1, 60)])
def test_a_model_whose_averages_have_not_settled_is_warned_of(
    momentum: float, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    layer = nn.BatchNorm1d(1, momentum=momentum)
    warn_of_unsettled(layer, steps)
    for _ in range(steps):
        layer(torch.tensor([[2.0], [4.0]]))  # mean 3: what is left of the first average is 1 - mean / 3
    left = 1 - layer.running_mean.item() / 3  # type: ignore[union-attr]
    warn_of_unsettled(layer, 1)  # averages that are not new count for what they are
    assert caplog.text.count("running averages") == (left > 0.1)
    assert (f"are still {100 * left:.0f} %" in caplog.text) == (left > 0.1)
