"""How sweeps end: students that fail, stops, kills; and what the same command does then."""

import errno
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.cli import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import DataError, KilledWorkerError, RecipeError, Stopped
from logitcache.student.learner import Learner
from logitcache.sweeps import stream
from logitcache.sweeps.outcomes import record_failure
from logitcache.views.epochs import EpochLoader
from tests.stage_one.apart import ended, forked
from tests.student.small import DROPOUT, LINEAR, metrics, weights
from tests.sweeps.killing import STEPS, kill
from tests.sweeps.small import CODE, VALIDATION, assert_same, run, swept

# Python 3.12 warns of every fork of a process with threads; the children below use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FOUR = {
    "student": {"model": DROPOUT, "validation": VALIDATION, "order_seed": 0},
    "grid": {"losses.0.temperature": [1, 4]},
    "seeds": 2,
}
DIVERGING = {"optimizer": {"kind": "sgd", "lr": 1e30}, "model": LINEAR}


def failing(at: int, error: str) -> dict[str, Any]:
    model = CODE | {"factory": CODE["factory"] + "failing", "arguments": {"at": at, "error": error}}
    return {"model": model}


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four students that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(cache, out, **FOUR)
    return out / "runs"


def assert_whole(out: Path, whole: Path) -> None:
    assert {one.name for one in (out / "runs").iterdir()} == {one.name for one in whole.iterdir()}
    for one in whole.iterdir():
        assert_same(out / "runs" / one.name, one)
    assert not list(out.rglob("*.logitcache-tmp"))


def test_a_student_that_fails_ends_alone_and_says_why(cache: Path, tmp_path: Path) -> None:
    cells = {"sound": {}, "diverging": DIVERGING, "mine": failing(5, "mine"), "memory": failing(9, "memory")}
    result = run(cache, tmp_path / "out", cells=cells)
    run(cache, tmp_path / "sound", cells={"sound": {}})
    assert_same(tmp_path / "out/runs/sound,seed=0", tmp_path / "sound/runs/sound,seed=0")
    assert (result.finished, result.exit_code) == (1, 2)
    assert result.images_rendered == 2 * 200
    reasons = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("failure.json")}
    assert {name.split(",")[0]: reason["error"] for name, reason in reasons.items()} == {
        "diverging": "DivergenceError",
        "mine": "ZeroDivisionError",
        "memory": "OutOfMemoryError",
    }
    assert {run.split(",")[0] for run in result.failed} == {"diverging", "mine", "memory"}
    assert "no longer finite" in result.failed["diverging,seed=0"]


def test_the_same_command_tries_errors_again_but_not_a_divergence(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {"sound": {}, "diverging": DIVERGING, "mine": failing(5, "mine")}
    run(cache, tmp_path, cells=cells)
    steps: list[str] = []
    add = Learner.add
    monkeypatch.setattr(Learner, "add", lambda self, *args: (steps.append("step"), add(self, *args))[1])
    monkeypatch.setattr("tests.sweeps.small.Failing.forward", lambda self, images: self.layers(images))
    result = run(cache, tmp_path, cells=cells)
    assert len(steps) == 14, "of the student that failed by an error, from its start"
    assert list(result.failed) == ["diverging,seed=0"]
    assert result.finished == 2


def test_an_error_of_the_data_is_that_of_all_its_students(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = EpochLoader.epoch

    def unreadable(self: EpochLoader, number: int, start: int = 0) -> Iterator[Any]:
        yield from itertools.islice(epoch(self, number, start), 3)
        raise DataError("image 7 cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoader, "epoch", unreadable)
        result = run(cache, tmp_path, grid={"losses.0.temperature": [1, 2], "batch_size": [32, 64]})
    assert len(result.failed) == 4
    assert all("image 7" in reason for reason in result.failed.values())
    assert run(cache, tmp_path, grid={"losses.0.temperature": [1, 2], "batch_size": [32, 64]}).exit_code == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [3, 20, 50])
def test_a_stopped_sweep_continues_by_the_same_command(
    step: int, signum: int, code: int, cache: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero_grad, steps = torch.optim.Optimizer.zero_grad, itertools.count(1)

    def stopping(self: Any, *args: Any, **options: Any) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signum)
        zero_grad(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", stopping)
        with pytest.raises(Stopped, match=r"The same command continues$") as stopped:
            run(cache, tmp_path, **FOUR)
    assert stopped.value.exit_code == code
    assert not list(tmp_path.rglob("group.json")), "it was not killed"
    assert run(cache, tmp_path, **FOUR).finished == 4
    assert_whole(tmp_path, whole)


def killed(work: Callable[[], object], event: int, *places: tuple[Any, str]) -> int:
    """Run in a fork, killed before the event-th call of any of some functions; returns how it ended."""

    def child() -> int:
        events = itertools.count(1)
        for owner, name in places:
            setattr(owner, name, _counted(getattr(owner, name), events, event))
        work()
        return 0

    return ended(forked(child), 300)


def _counted(function: Callable[..., Any], events: Iterator[int], event: int) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return counted


def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    found = kill(tmp_path, 10)
    assert found["kills"] >= 8
    assert (found["ended"], found["same"], found["runs"]) == (0, True, 8)
    assert 0 < found["twice"] <= STEPS, "nothing is trained twice beyond an epoch"


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_search_that_is_killed_again_and_again_ends_with_the_same_trials_and_bytes(kind: str, tmp_path: Path) -> None:
    if kind == "optuna":
        pytest.importorskip("optuna")
    found = kill(tmp_path, 6, kind)
    assert found["kills"] >= 4
    assert (found["ended"], found["same"], found["trials"]) == (0, True, True)
    assert found["twice"] <= STEPS, "nothing is trained twice beyond an epoch"


def test_a_killed_group_is_split_and_finished_students_are_not_trained_again(
    cache: Path, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(lambda: run(cache, tmp_path, **FOUR), 30, (Learner, "add")) == -signal.SIGKILL
    sizes: list[int] = []
    together = stream.train_together
    monkeypatch.setattr(
        stream,
        "train_together",
        lambda recipes, *args, **options: sizes.append(len(recipes)) or together(recipes, *args, **options),
    )
    run(cache, tmp_path, **FOUR)
    assert sizes == [2, 2]
    assert "killed as they trained together: now 2 train at a time" in caplog.text
    assert_whole(tmp_path, whole)
    sizes.clear()
    run(cache, tmp_path, **FOUR)
    assert sizes == []


def test_a_killed_process_that_renders_leads_to_a_smaller_group(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise KilledWorkerError("a process that renders views was killed")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "train_together", broken)
        with pytest.raises(KilledWorkerError):
            run(cache, tmp_path, **FOUR)
    sizes: list[int] = []
    monkeypatch.setattr(stream, "train_together", lambda recipes, *args, **options: sizes.append(len(recipes)) or [])
    run(cache, tmp_path, **FOUR)
    assert sizes == [2, 2]


def test_a_sweep_that_grows_trains_what_is_new(cache: Path, tmp_path: Path, whole: Path) -> None:
    recipe = {**FOUR, "grid": {"losses.0.temperature": [1]}}
    run(cache, tmp_path, **recipe)  # two of the four are finished
    result = run(cache, tmp_path, **FOUR)
    assert result.finished == 4
    assert result.images_rendered == 2 * 2 * 200
    assert_whole(tmp_path, whole)


def test_students_that_are_ahead_wait_for_the_slowest(cache: Path, tmp_path: Path, whole: Path) -> None:
    """Of four students three were killed at a later place than the fourth, which begins."""
    work = lambda: run(cache, tmp_path, **FOUR | {"grid": {"losses.0.temperature": [1]}})  # noqa: E731
    assert killed(work, 20, (Learner, "add")) == -signal.SIGKILL
    assert [len(metrics(one)) for one in sorted((tmp_path / "runs").iterdir())] == [1, 1]
    for note in tmp_path.rglob("group.json"):
        note.unlink()
    result = run(cache, tmp_path, **FOUR)
    assert result.images_rendered == 2 * 200, "once for all, from the start of the two that had not begun"
    assert_whole(tmp_path, whole)


def test_two_sweeps_do_not_write_to_one_folder(cache: Path, tmp_path: Path) -> None:
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RecipeError, match="another sweep writes to"):
            run(cache, tmp_path)
    finally:
        os.close(descriptor)


def test_the_exit_code_tells_that_students_failed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(dump_recipe(swept(cache, cells={"sound": {}, "diverging": DIVERGING})))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), str(tmp_path / "out"), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["finished"] == 1
    assert "diverging,seed=0 failed: DivergenceError" in document["error"]["message"]
    assert metrics(tmp_path / "out/runs/sound,seed=0")
    assert weights(tmp_path / "out/runs/sound,seed=0")


def test_an_error_of_the_file_system_is_recorded_with_its_fix(tmp_path: Path) -> None:
    failure = record_failure(tmp_path, OSError(errno.ENOSPC, "No space left on device", "x"))
    assert (failure.error, failure.exit_code) == ("RecipeError", 2)
    assert "x: No space left on device" in failure.message
    assert "Fix: " in failure.message
