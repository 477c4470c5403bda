"""A run that is finished goes on to more epochs, by the schedules of the longer run."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import CacheError, MismatchError
from logitcache.runtime import console
from logitcache.student.training import train
from tests.student.small import DROPOUT, TEST_IMAGES, metrics, student, teacher, weights

CONSTANT = {"schedule": {"final_lr": 1.0}}
VALIDATION = {"dataset": TEST_IMAGES}


@pytest.mark.parametrize(
    "options",
    [
        {"model": DROPOUT, "ema": 0.9},
        {"keep": "best", "validation": VALIDATION},
    ],
)
def test_without_a_schedule_it_is_the_longer_run(options: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    entries = CONSTANT | options
    train(student(tmp_path / "run", cache, epochs=1, **entries))
    extended = train(student(tmp_path / "run", cache, epochs=3, **entries), resume=True)
    whole = train(student(tmp_path / "whole", cache, epochs=3, **entries))
    assert weights(extended) == weights(whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert (extended.epochs, extended.steps, extended.images) == (3, 21, 600)


def test_a_run_on_mixed_labels_too(tmp_path: Path) -> None:
    entries = CONSTANT | {"mixing": [{"kind": "mixup"}]}
    train(teacher(tmp_path / "run", epochs=1, **entries))
    extended = train(teacher(tmp_path / "run", epochs=2, **entries), resume=True)
    assert weights(extended) == weights(train(teacher(tmp_path / "whole", epochs=2, **entries)))


def test_the_schedule_is_that_of_the_longer_run_from_there_on(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train(student(tmp_path / "run", cache, epochs=2))
    console.configure()
    extended = train(student(tmp_path / "run", cache, epochs=4), resume=True)
    console.configure(quiet=True)
    whole = train(student(tmp_path / "whole", cache, epochs=4))
    rates, longer = ([row["lr"] for row in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert rates[2:] == longer[2:]
    assert rates[1] < rates[2]
    assert weights(extended) != weights(whole)
    err = capfd.readouterr().err
    assert "goes on to 4 epochs, it was begun for 2: from step 14 on" in err
    assert "learning rate 0.0005, was to be 0)" in err
    with pytest.raises(MismatchError, match="epochs: the run has 4, the recipe 2"):
        train(student(tmp_path / "run", cache, epochs=2), resume=True)
    assert first.epochs == 2


def test_the_best_weights_may_be_those_of_the_shorter_run(cache: Path, tmp_path: Path) -> None:
    still = {"keep": "best", "validation": VALIDATION, "optimizer": {"kind": "adamw", "lr": 1e-12}}
    first = weights(train(student(tmp_path / "run", cache, epochs=1, **still)))
    train(student(tmp_path / "run", cache, epochs=2, **still), resume=True)
    assert weights(tmp_path / "run") == first


def test_without_its_checkpoint_it_cannot(cache: Path, tmp_path: Path) -> None:
    entry = {"epochs": 1, "model": DROPOUT}
    train(student(tmp_path / "run", cache, **entry))
    shutil.move(tmp_path / "run" / "checkpoint.pt", tmp_path / "copy")
    longer = student(tmp_path / "run", cache, **entry | {"epochs": 2})
    with pytest.raises(CacheError, match=r"checkpoint.pt is missing.* Fix: put back a copy of it, or train again"):
        train(longer, resume=True)
    assert len(metrics(tmp_path / "run")) == 1
    shutil.move(tmp_path / "copy", tmp_path / "run" / "checkpoint.pt")
    assert train(longer, resume=True).epochs == 2
