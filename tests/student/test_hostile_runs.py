"""A run folder is data: whatever lies in it ends resuming with one error, in bounded time and memory."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import CacheError, LogitCacheError, Stopped
from logitcache.student.training import train
from tests.student.small import student


@pytest.fixture(scope="module")
def begun(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first epoch."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.AdamW.step
        calls = iter(range(100))

        def stopping(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
            if next(calls) == 9:
                os.kill(os.getpid(), 15)
            return step(self, *args, **options)

        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(Stopped):
            train(student(out, cache))
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def _refused(run: Path, cache: Path) -> CacheError:
    """Resume, which must fail as damage, and leave the folder as it is."""
    with pytest.raises(CacheError, match=r"is damaged: .*Fix: put back a copy") as refused:
        train(student(run, cache), resume=True)
    assert refused.value.exit_code == 3
    assert len(str(refused.value)) < 1000
    return refused.value


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("recipe.yaml", _fifo),
        ("environment.json", _fifo),
        ("metrics.jsonl", _fifo),
        ("checkpoint.pt", _fifo),
        ("recipe.yaml", _endless),
        ("environment.json", _link),
        ("metrics.jsonl", _folder),
        ("checkpoint.pt", _endless),
        ("recipe.yaml", _sparse),
        ("environment.json", _sparse),
        ("metrics.jsonl", _sparse),
        ("checkpoint.pt", _sparse),
    ],
)
def test_only_regular_files_of_a_bounded_size_are_read(
    name: str, change: Callable[[Path], None], run: Path, cache: Path
) -> None:
    change(run / name)
    assert name in str(_refused(run, cache))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"epoch": NaN}', b'"text"', b"1e999"])
@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl"])
def test_a_file_that_is_not_as_it_was_written_is_named(name: str, content: bytes, run: Path, cache: Path) -> None:
    (run / name).write_bytes(content + b"\n")
    assert name in str(_refused(run, cache))


@pytest.mark.parametrize(("key", "value"), [("epoch", "0"), ("loss", "0.5"), ("seconds", [1]), ("epoch", 0.5)])
def test_metrics_are_numbers(key: str, value: object, run: Path, cache: Path) -> None:
    row = json.loads((run / "metrics.jsonl").read_text())
    (run / "metrics.jsonl").write_text(json.dumps(row | {key: value}) + "\n")
    assert "metrics.jsonl" in str(_refused(run, cache))


@pytest.mark.parametrize("content", [{}, {"out": 3}, [], {"epochs": "two"}, "text"])
def test_a_result_of_another_form_is_refused(content: object, run: Path, cache: Path) -> None:
    (run / "result.json").write_text(json.dumps(content))
    assert "result.json" in str(_refused(run, cache))


def _changed(state: Any, keys: str, value: object) -> None:
    """Set an entry of nested mappings and lists."""
    *above, last = [int(key) if key.isdigit() else key for key in keys.split("/")]
    for key in above:
        state = state[key]
    state[last] = value(state[last]) if callable(value) else value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("place", ["9", 1, 2]),
        ("place", [9.0, 1, 2]),
        ("place", [9, -1, 2]),
        ("place", "9,1,2"),
        ("place", [True, 1, 2]),
        ("place", [10**18, 1, 2]),
        ("place", [9, 10**18, 2]),
        ("place", [9, 1, 10**18]),
        ("place", [9, 1]),
        ("seconds", "3"),
        ("seconds", float("nan")),
        ("seconds", None),
        ("model", "weights"),
        ("model/module.3.bias", torch.Tensor.int),
        ("model/module.3.bias", [0.0] * 10),
        ("model/module.3.bias", torch.Tensor.double),
        ("optimizer", 3),
        ("optimizer/state", [1]),
        ("optimizer/state/0", "moments"),
        ("optimizer/state/0/exp_avg", "moments"),
        ("optimizer/state/0/exp_avg", torch.Tensor.long),
        ("optimizer/state/0/exp_avg", torch.zeros(1, 1)),
        ("optimizer/param_groups", "groups"),
        ("optimizer/param_groups/0/lr", "0.1"),
        ("optimizer/param_groups/0/betas", 0.9),
        ("optimizer/param_groups/0/betas", ("0.9", "0.99")),
        ("ranks", []),
        ("ranks", {"a": 1}),
        ("ranks/0", "rank"),
        ("ranks/0/sums", "sums"),
        ("ranks/0/random", {"cpu": "state"}),
    ],
)
def test_a_checkpoint_of_texts_for_numbers_is_refused(keys: str, value: object, run: Path, cache: Path) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    _changed(state, keys, value)
    torch.save(state, run / "checkpoint.pt")
    assert "checkpoint.pt" in str(_refused(run, cache))


@pytest.mark.parametrize("key", ["model", "adapters", "optimizer", "place", "ranks", "seconds"])
def test_a_checkpoint_that_lacks_something_is_an_error(key: str, run: Path, cache: Path) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state[key]
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(LogitCacheError, match=r"checkpoint\.pt") as refused:
        train(student(run, cache), resume=True)
    assert refused.value.exit_code in (3, 4)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(run: Path, cache: Path) -> None:
    with zipfile.ZipFile(run / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data.pkl", bytes(64 << 20))
    assert (run / "checkpoint.pt").stat().st_size < 1 << 20
    assert "compressed" in str(_refused(run, cache))


def test_the_advice_to_load_a_file_unguarded_is_not_repeated(run: Path, cache: Path) -> None:
    torch.save({"model": run}, run / "checkpoint.pt")  # a class that reading it would have to import
    message = str(_refused(run, cache))
    assert "could run code" in message
    assert "weights_only" not in message
    assert "still be loaded" not in message
