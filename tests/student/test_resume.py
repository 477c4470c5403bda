"""Stopped anywhere and resumed, a run ends with the bytes of one that was never stopped."""

import itertools
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.errors import CacheError, LogitCacheError, MismatchError, RecipeError, Stopped
from logitcache.runtime.console import configure
from logitcache.store import files
from logitcache.student.evaluation import single_label
from logitcache.student.learner import Learner
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.teacher.online import live_targets
from tests.student.small import (
    DROPOUT,
    IMAGES,
    LINEAR,
    NUM_IMAGES,
    TEST_IMAGES,
    fill,
    metrics,
    network,
    student,
    teacher,
    weights,
)

VALIDATION = {"dataset": TEST_IMAGES, "batch_size": 40}
STEPS = 14  # two epochs of seven
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint_steps": {"checkpoint_steps": 3},
    "ema": {"ema": 0.8, "validation": VALIDATION},
    "best": {"keep": "best", "validation": VALIDATION, "checkpoint_steps": 3},
    "momentum": {"optimizer": {"kind": "sgd"}, "schedule": {"warmup_epochs": 1}},
    "dropout": {"model": DROPOUT, "losses": [{"kind": "kl_divergence"}, {"kind": "cross_entropy"}]},
    "micro_batches": {"micro_batches": 3},
    "clip_norm": {"clip_norm": 0.1, "channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    # So large a loss overflows float16 until the scale has been halved a few times.
    "float16": {"precision": "float16", "losses": [{"kind": "kl_divergence", "weight": 100}]},
    "all": {
        "model": DROPOUT,
        "optimizer": {"kind": "sgd"},
        "ema": 0.9,
        "clip_norm": 0.5,
        "micro_batches": 2,
        "checkpoint_steps": 2,
        "validation": VALIDATION,
        "drop_last": True,
    },
}
STEP, RENAME, RENAMED = (Learner, "add"), (os, "replace"), (files, "sync_directory")
variants = pytest.mark.parametrize("variant", VARIANTS)

# Python 3.12 warns of every fork of a process with threads; the child below uses none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train a variant to its end, once."""
    done: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in done:
            done[variant] = tmp_path_factory.mktemp("uninterrupted") / variant
            train(student(done[variant], cache, **VARIANTS[variant]))
        return done[variant]

    return run


def _assert_same(run: Path, reference: Path) -> None:
    assert weights(run) == weights(reference)
    assert metrics(run) == metrics(reference)
    results = [json.loads((path / "result.json").read_text()) for path in (run, reference)]
    for result in results:
        del result["out"], result["seconds"]
    assert results[0] == results[1]
    table = [line.split(",")[:4] for line in (run / "metrics.csv").read_text().splitlines()]
    assert table == [line.split(",")[:4] for line in (reference / "metrics.csv").read_text().splitlines()]


def _call_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, action: Callable[[], None]) -> None:
    """Do something before the count-th call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args: Any, **options: Any) -> Any:
        if next(calls) == count:
            action()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counted)


def _signal(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def _stopped_at(step: int, recipe: StudentRecipe, signum: int = signal.SIGTERM, resume: bool = False) -> Stopped:
    with pytest.MonkeyPatch.context() as patch:
        _call_at(patch, torch.optim.Optimizer, "zero_grad", step, _signal(signum))
        with pytest.raises(Stopped) as stopped:
            train(recipe, resume=resume)
    return stopped.value


@variants
def test_sigterm_in_an_epoch_then_resume_gives_the_same_bytes(
    variant: str, cache: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    recipe = student(tmp_path / "run", cache, **VARIANTS[variant])
    step = random.Random(variant).randint(1, 11)
    error = _stopped_at(step, recipe)
    assert error.exit_code == 75
    assert f"after step {step}" in str(error)
    assert "--resume" in str(error)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    torch.manual_seed(step)  # what the resuming process drew before must not matter
    train(recipe, resume=True)
    _assert_same(tmp_path / "run", uninterrupted(variant))


def test_ctrl_c_stops_with_its_own_exit_code(cache: Path, tmp_path: Path) -> None:
    assert _stopped_at(2, student(tmp_path / "run", cache), signal.SIGINT).exit_code == 130


def test_a_run_stopped_after_every_step_is_the_same_run(
    cache: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    recipe = student(tmp_path / "run", cache, **VARIANTS["all"])
    steps = 2 * (NUM_IMAGES // 32)
    for step in range(steps):
        _stopped_at(1, recipe, resume=step > 0)
    train(recipe, resume=True)
    _assert_same(tmp_path / "run", uninterrupted("all"))


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_sigterm_while_measuring_then_resume_gives_the_same_bytes(
    call: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Callable[[str], Path]
) -> None:
    recipe = student(tmp_path / "run", cache, **VARIANTS["ema"])
    with monkeypatch.context() as patch:
        _call_at(patch, single_label, "_of_rows", call, _signal(signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            train(recipe)
    assert stopped.value.exit_code == 75
    train(recipe, resume=True)
    _assert_same(tmp_path / "run", uninterrupted("ema"))


def _in_a_child(work: Callable[[], object]) -> int:
    """Run in a forked process, warm as this one is; returns how it ended as `os.waitstatus_to_exitcode` says it."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed_at(event: int, recipe: StudentRecipe, *places: tuple[Any, str]) -> Callable[[], object]:
    """Train, and be killed before the event-th call of any of some functions."""

    def work() -> None:
        events = itertools.count(1)
        for owner, name in places:
            setattr(owner, name, _counted(getattr(owner, name), events, event))  # in a child, which ends with this
        train(recipe, resume=True)

    return work


def _counted(function: Callable[..., Any], events: Iterator[int], event: int) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return counted


@pytest.mark.parametrize("variant", ["checkpoint_steps", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_moments_then_resume_gives_the_same_bytes(
    seed: int, variant: str, cache: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    reference = uninterrupted(variant)
    recipe = student(tmp_path / "run", cache, **VARIANTS[variant])
    moments = random.Random(seed)
    endings = [-signal.SIGKILL]
    while endings[-1] == -signal.SIGKILL:
        endings.append(_in_a_child(_killed_at(moments.randint(10, 24), recipe, STEP, RENAME, RENAMED)))
    assert len(endings) > 2
    assert endings[-1] == 0
    _assert_same(tmp_path / "run", reference)
    assert not list((tmp_path / "run").glob("*.logitcache-tmp"))


# Two files to begin with, four in each of two epochs, four at the end.
@pytest.mark.parametrize("write", range(1, 2 + 4 * 2 + 4 + 1))
def test_sigkill_at_any_write_then_resume_gives_the_same_bytes(
    write: int, cache: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    reference = uninterrupted("ema")
    recipe = student(tmp_path / "run", cache, **VARIANTS["ema"])
    assert _in_a_child(_killed_at(write, recipe, RENAME)) == -signal.SIGKILL
    train(recipe, resume=True)
    _assert_same(tmp_path / "run", reference)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(student(out, cache, validation=VALIDATION))
    return out


@pytest.fixture
def begun(cache: Path, tmp_path: Path) -> Path:
    _stopped_at(9, student(tmp_path / "begun", cache))
    return tmp_path / "begun"


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_resuming_a_finished_run_returns_its_result_and_trains_nothing(
    finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(finished)
    configure()
    monkeypatch.delattr(Learner, "add")
    result = train(student(finished, cache, validation=VALIDATION), resume=True)
    assert (result.steps, result.epochs, result.out) == (STEPS, 2, str(finished))
    assert result.loss == metrics(finished)[-1]["loss"]
    assert _contents(finished) == before
    assert f"{finished} is finished, there is nothing to do" in capsys.readouterr().err


def test_a_finished_run_may_have_moved_and_lost_its_checkpoint(finished: Path, cache: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    (moved / "checkpoint.pt").unlink()
    before = _contents(moved)
    result = train(student(moved, cache, validation=VALIDATION), resume=True)
    assert result.out == str(moved)
    assert _contents(moved) == before


def test_resuming_where_nothing_began_begins(cache: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]) -> None:
    train(student(tmp_path / "run", cache), resume=True)
    _assert_same(tmp_path / "run", uninterrupted("plain"))


def test_a_run_is_not_overwritten_without_resume(begun: Path, finished: Path, cache: Path) -> None:
    for run in (begun, finished):
        before = _contents(run)
        with pytest.raises(RecipeError, match=f"{run.name} holds a run already. Fix: --resume") as refused:
            train(student(run, cache))
        assert refused.value.exit_code == 2
        assert _contents(run) == before


def test_a_run_that_exists_is_refused_before_the_cache_is_read(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds a run already"):
        train(student(begun, tmp_path / "no cache at all"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer": {"kind": "adamw", "lr": 0.5}}, r"optimizer\.lr: the run has 0\.001, the recipe 0\.5"),
        ({"model": {"kind": "small_cnn", "width": 8}}, r"model\.width: the run has 4, the recipe 8"),
        ({"seed": 1}, "seed: the run has 0, the recipe 1"),
        ({"epochs": 1}, "epochs: the run has 2, the recipe 1"),
        ({"losses": [{"kind": "kl_divergence", "temperature": 2}]}, r"losses\.0\.temperature: the run has 1\.0"),
        ({"validation": VALIDATION}, r"validation\.batch_size: the run has None, the recipe 40"),
        ({"micro_batches": 2, "ema": 0.5}, r"micro_batches: .*\n.*ema: "),
    ],
)
def test_another_recipe_is_refused_naming_its_keys(changes: dict[str, Any], key: str, begun: Path, cache: Path) -> None:
    before = _contents(begun)
    with pytest.raises(MismatchError, match=key) as refused:
        train(student(begun, cache, **changes), resume=True)
    assert refused.value.exit_code == 4
    assert _contents(begun) == before


def test_how_fast_and_where_may_change(begun: Path, cache: Path, uninterrupted: Callable[[str], Path]) -> None:
    moved = begun.with_name("moved")
    begun.rename(moved)
    copy = begun.with_name("cache")
    shutil.copytree(cache, copy)
    free = {"num_workers": 1, "start_method": "fork", "checkpoint_steps": 5, "verify": "numeric", "dataset": IMAGES}
    train(student(moved, copy, **free), resume=True)
    _assert_same(moved, uninterrupted("plain"))


def test_a_run_of_another_kind_is_refused(begun: Path) -> None:
    with pytest.raises(MismatchError, match="another kind of recipe"):
        train(teacher(begun), resume=True)


def test_another_cache_is_refused(begun: Path, caches: Path) -> None:
    other = fill(caches / "another seed", views={"num_views": 2, "seed": 4})
    with pytest.raises(MismatchError, match=r"begun on other data; these differ: cache\. Fix") as refused:
        train(student(begun, other), resume=True)
    assert refused.value.exit_code == 4


def test_a_run_from_the_cache_does_not_go_on_online(begun: Path, cache: Path) -> None:
    live = live_targets(str(cache), "cpu", modules={"net": network()})
    with pytest.raises(MismatchError, match="these differ: online"):
        train(student(begun, cache), resume=True, live=live)


def test_other_images_of_a_teacher_are_refused(tmp_path: Path) -> None:
    recipe = teacher(tmp_path / "run", epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        _call_at(patch, torch.optim.Optimizer, "zero_grad", 3, _signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            train(recipe)
    fewer = teacher(tmp_path / "run", epochs=2, dataset=IMAGES | {"num_images": 100})
    with pytest.raises(MismatchError, match=r"these differ: dataset\.num_images"):
        train(fewer, resume=True)


def test_other_images_to_measure_on_are_refused(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, validation=VALIDATION)
    _stopped_at(2, recipe)
    fewer = {"dataset": TEST_IMAGES | {"num_images": 50}, "batch_size": 40}
    with pytest.raises(MismatchError, match=r"these differ: validation\.dataset\.num_images"):
        train(student(tmp_path / "run", cache, validation=fewer), resume=True)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _pickle(file: Path) -> None:
    torch.save({"place": file}, file)  # a class that reading it would have to import


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _pickle])
def test_a_damaged_checkpoint_is_an_error_that_names_it(
    damage: Callable[[Path], None], begun: Path, cache: Path
) -> None:
    damage(begun / "checkpoint.pt")
    with pytest.raises(CacheError, match=r"checkpoint\.pt is damaged: .*Fix") as refused:
        train(student(begun, cache), resume=True)
    assert refused.value.exit_code == 3


def test_a_checkpoint_of_another_model_is_an_error_that_names_it(begun: Path, cache: Path, tmp_path: Path) -> None:
    _stopped_at(3, student(tmp_path / "other", cache, model=LINEAR))
    shutil.copy(tmp_path / "other" / "checkpoint.pt", begun)
    with pytest.raises(MismatchError, match=r"checkpoint\.pt is of another model"):
        train(student(begun, cache), resume=True)


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl"])
def test_a_missing_or_damaged_file_of_a_run_is_an_error(name: str, begun: Path, cache: Path) -> None:
    _truncate(begun / name)
    with pytest.raises(LogitCacheError):
        train(student(begun, cache), resume=True)
    (begun / name).unlink()
    with pytest.raises(LogitCacheError):
        train(student(begun, cache), resume=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_callers_signal_handlers_are_put_back(signum: int, cache: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    _stopped_at(2, student(tmp_path / "run", cache), signum)
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(("name", "before"), [("torch", "2.0.0"), ("threads", "99")])
def test_what_a_session_ran_with_is_kept_over_a_resume(name: str, before: str, begun: Path, cache: Path) -> None:
    file = begun / "environment.json"
    environment = json.loads(file.read_text())
    now = environment["versions"][0] | {}
    environment["versions"][0][name] = before
    file.write_text(json.dumps(environment))
    train(student(begun, cache), resume=True)
    assert json.loads(file.read_text())["versions"] == [now | {name: before}, now]
    assert now[name] == {"torch": version("torch"), "threads": str(torch.get_num_threads())}[name]


def test_the_state_of_the_learner_is_plain(begun: Path) -> None:
    state = torch.load(begun / "checkpoint.pt", weights_only=True)
    assert state["place"] == [9, 1, 2]
    assert np.isfinite(state["seconds"])
