"""Accelerate leaves a loader as it is: the loop sets epochs and moves batches."""

from pathlib import Path

import pytest

from logitcache.views.epochs import EpochLoader
from tests.integrations.loops import (
    EPOCHS,
    expected,
    loader_of,
    loss_of,
    optimizer_of,
    require_equal,
    student,
    top_k_cache,
)

accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
pytestmark = pytest.mark.integration


def test_an_accelerated_loop_takes_the_steps_of_a_plain_one(tmp_path: Path) -> None:
    cache = top_k_cache(tmp_path)
    weights, keys = expected(cache)
    accelerator = accelerate.Accelerator(cpu=True)
    module = student()
    module, optimizer, loader = accelerator.prepare(module, optimizer_of(module), loader_of(cache))
    assert isinstance(loader, EpochLoader)
    seen = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            batch = batch.to(accelerator.device)
            seen.append(batch.keys.tolist())
            with accelerator.accumulate(module):
                accelerator.backward(loss_of(module, batch))
                optimizer.step()
                optimizer.zero_grad()
    assert seen == keys
    require_equal(accelerator.unwrap_model(module).state_dict(), weights)
