"""A run on a cache that grows meanwhile continues on what it began with."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import MismatchError, RecipeError, Stopped
from logitcache.student.training import train
from tests.student.small import AUGMENTATIONS as AUGMENTED
from tests.student.small import fill, metrics, network, student, weights

VIEWS = {"num_views": 2, "seed": 3, "augmentations": AUGMENTED}
GROWN = VIEWS | {"num_views": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("cache") / "c.zarr")


@pytest.fixture(scope="module")
def grown(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(small, tmp_path_factory.mktemp("grown") / "c.zarr"))
    return fill(path, {"other": network(2), "net": network()}, views=GROWN)


def stopped(recipe: Any, call: int) -> None:
    """Stop a run after some optimiser steps."""
    step, calls = torch.optim.Optimizer.zero_grad, 0

    def counted(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGTERM)
        step(self, set_to_none)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", counted)
        with pytest.raises(Stopped):
            train(recipe)


def test_a_run_continues_bit_by_bit_on_a_cache_that_has_grown(small: Path, grown: Path, tmp_path: Path) -> None:
    """Epoch 3 replays view 0 again, as there were two views when it began; one teacher needs no name."""
    changes = {"epochs": 3, "checkpoint_steps": 1}
    train(student(tmp_path / "whole", small, **changes))
    stopped(student(tmp_path / "run", small, **changes), 9)
    train(student(tmp_path / "run", grown, **changes), resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_run_that_is_finished_is_finished_when_its_cache_has_grown(small: Path, grown: Path, tmp_path: Path) -> None:
    first = train(student(tmp_path / "run", small))
    assert train(student(tmp_path / "run", grown), resume=True) == first


def test_the_first_views_of_a_cache_are_a_cache(small: Path, grown: Path, tmp_path: Path) -> None:
    loss = [{"kind": "kl_divergence", "teacher": "net"}]
    train(student(tmp_path / "small", small, epochs=3, losses=loss))
    train(student(tmp_path / "grown", grown, epochs=3, losses=loss, num_views=2))
    assert weights(tmp_path / "grown") == weights(tmp_path / "small")


def test_more_views_than_there_are_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"num_views is 3, .* has 2 views\. Fix"):
        train(student(tmp_path / "run", small, num_views=3))


def test_a_cache_with_less_than_the_run_began_with_is_another(small: Path, grown: Path, tmp_path: Path) -> None:
    loss = [{"kind": "kl_divergence", "teacher": "net"}]
    stopped(student(tmp_path / "run", grown, losses=loss), 3)
    with pytest.raises(MismatchError, match="begun on other data; these differ: cache, num_views"):
        train(student(tmp_path / "run", small, losses=loss), resume=True)


def test_a_run_that_begins_on_a_grown_cache_uses_all_of_it(small: Path, grown: Path, tmp_path: Path) -> None:
    loss = [{"kind": "kl_divergence", "teacher": "net"}]
    train(student(tmp_path / "small", small, epochs=3, losses=loss))
    train(student(tmp_path / "grown", grown, epochs=3, losses=loss))
    assert weights(tmp_path / "grown") != weights(tmp_path / "small")
