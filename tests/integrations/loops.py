"""A student and the plain loop that other libraries' loops must equal."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.student import losses
from logitcache.targets import Batch
from logitcache.views.epochs import EpochLoader
from tests.student.small import fill

EPOCHS, TEMPERATURE = 3, 2.0
Keys = list[list[list[int]]]


def top_k_cache(folder: Path) -> Path:
    """A cache of two views whose targets are no tensors inside."""
    return fill(folder / "c.zarr", logits={"kind": "top_k", "k": 3})


def loader_of(cache: Path) -> EpochLoader:
    return open_cache(cache).loader(batch_size=64, seed=4)


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05)


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return losses.kl_divergence(module(batch.images.float() / 255), batch.targets, TEMPERATURE)


def plain(epochs: Iterable[Iterable[Batch]]) -> tuple[dict[str, Tensor], Keys]:
    """Train on the batches of epochs; returns the weights, and the keys of every batch."""
    module, keys = student(), []
    optimizer = optimizer_of(module)
    for batches in epochs:
        for batch in batches:
            keys.append(batch.keys.tolist())
            loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return module.state_dict(), keys


def expected(cache: Path) -> tuple[dict[str, Tensor], Keys]:
    loader = loader_of(cache)
    return plain(loader.epoch(epoch) for epoch in range(EPOCHS))


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
