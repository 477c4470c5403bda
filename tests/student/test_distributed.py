"""Several processes train as one does: the same samples, losses and files, whatever stops them."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe
from logitcache.errors import DataError, RecipeError
from logitcache.runtime.device import resolve_device
from logitcache.student.distributed.ranks import Ranks
from logitcache.student.evaluation.validation import Validator
from logitcache.student.training import train
from logitcache.student.training_data import open_training_data
from tests.student.featured import ON_FEATURES, fill_featured
from tests.student.ranks import at_step, seen, together, train_together
from tests.student.small import (
    DROPOUT,
    PARTLY,
    TEST_IMAGES,
    TINY,
    fill,
    metrics,
    recorded_losses,
    student,
    teacher,
    weights,
)
from tests.student.test_trackers import scalars
from tests.warm import Program

BARE = {"kind": "custom", "factory": "tests.student.test_distributed:bare"}
BOTH = [{"kind": "kl_divergence", "temperature": 2}, {"kind": "cross_entropy", "weight": 0.5}]
VALIDATION = {"dataset": TEST_IMAGES, "batch_size": 40}
LONG = {"model": BARE, "losses": BOTH, "epochs": 8}  # 56 steps, eight of them of the 8 images that are left
STEPS = 14  # two epochs of seven

# Python 3.12 warns of every fork of a process with threads; the children use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def bare() -> nn.Module:
    """A factory: no batch normalisation and no dropout, so that a batch is the sum of its parts."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


@pytest.fixture(autouse=True)
def _on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def _close(run: Path, reference: Path, tolerance: float = 1e-5) -> None:
    for name in ("weights.safetensors", "adapters.safetensors"):
        if (reference / name).exists():
            torch.testing.assert_close(load_file(run / name), load_file(reference / name), atol=tolerance, rtol=1e-4)
    for row, wanted in zip(metrics(run), metrics(reference), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=tolerance)


def _step_losses(recipe: Any, size: int) -> list[float]:
    """The mean of all terms over the rows of all ranks, step by step."""
    totals: dict[int, Any] = {}
    for rank in seen(recipe, size):
        for step, terms, rows in rank["terms"]:
            part = torch.tensor([[t * n for t, n in zip(terms, rows, strict=True)], rows], dtype=torch.float64)
            totals[step] = totals.get(step, 0) + part
    return [float((sums / rows.clamp(min=1)).sum()) for _, (sums, rows) in sorted(totals.items())]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_losses_of_one_process_step_by_step(size: int, cache: Path, tmp_path: Path) -> None:
    whole = student(tmp_path / "whole", cache, **LONG)
    with recorded_losses() as terms:
        train(whole)
    parts = student(tmp_path / "parts", cache, **LONG)
    assert train_together(size, parts) == [(0, "")] * size
    assert len(terms) == 56
    assert _step_losses(parts, size) == pytest.approx([sum(step) for step in terms], abs=1e-5)
    _close(tmp_path / "parts", tmp_path / "whole")


VARIANTS: dict[str, dict[str, Any]] = {
    # Ranks have labels of different numbers of rows, at times of none.
    "labels": {"losses": [{"kind": "cross_entropy"}, {"kind": "kl_divergence"}]},
    "micro_batches": {"losses": BOTH, "micro_batches": 5, "clip_norm": 0.1, "ema": 0.9, "optimizer": {"kind": "sgd"}},
    "dynamic": {
        "losses": [
            {
                "kind": "kl_divergence",
                "temperature": {"kind": "dynamic", "start": 2, "step": 0.25, "min": 1, "max": 6, "margin": 0.1},
            }
        ]
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_learn_what_one_process_learns(variant: str, partly: Path, tmp_path: Path) -> None:
    entries = {"model": BARE, "dataset": PARTLY, **VARIANTS[variant]}
    train(student(tmp_path / "whole", partly, **entries))
    assert train_together(2, student(tmp_path / "parts", partly, **entries)) == [(0, "")] * 2
    _close(tmp_path / "parts", tmp_path / "whole")


def test_ranks_train_a_teacher_on_pairs_that_are_mixed(tmp_path: Path) -> None:
    entries = {"model": BARE, "mixing": [{"kind": "mixup"}]}
    train(teacher(tmp_path / "whole", **entries))
    assert train_together(3, teacher(tmp_path / "parts", **entries)) == [(0, "")] * 3
    _close(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_featured(tmp_path_factory.mktemp("featured") / "cache")


def test_what_losses_train_beside_the_student_is_the_same_and_unused_weights_stay(
    featured: Path, tmp_path: Path
) -> None:
    kinds = ("hint", "vid", "attention_transfer", "grad_cam")  # none asks for the last layer but the last
    losses = [{"kind": kind, **ON_FEATURES[kind]} for kind in kinds]
    for name, chosen in (("all", losses), ("hint", losses[:1])):
        entries = {"model": BARE, "losses": chosen, "epochs": 1}
        train(student(tmp_path / f"{name} whole", featured, **entries))
        assert train_together(2, student(tmp_path / f"{name} parts", featured, **entries)) == [(0, "")] * 2
        _close(tmp_path / f"{name} parts", tmp_path / f"{name} whole")


@pytest.mark.parametrize("changes", [{}, {"views_per_image": 2}, {"sampling": {"kind": "class_balanced"}}, "mixed"])
def test_ranks_part_every_batch_without_overlap(changes: Any, cache: Path, tmp_path: Path, caches: Path) -> None:
    if changes == "mixed":
        views = {"num_views": 2, "seed": 3, "mixing": [{"kind": "mixup"}]}
        cache, changes = fill(caches / "mixed for ranks", views=views), {}
    epochs, entry = [], student(tmp_path / "any", cache, **changes)
    for size in (1, 2, 3):
        ranks = [open_training_data(entry).stream([entry], Ranks(rank, size)).loader for rank in range(size)]
        batches = [zip(*(loader.keys(epoch) for loader in ranks), strict=True) for epoch in range(2)]
        epochs.append([[[key for part in parts for key in part] for parts in batch] for batch in batches])
    assert epochs[0] == epochs[1] == epochs[2]
    assert Counter(key for batch in epochs[0][0] for key in batch).total() == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"model": TINY, "validation": VALIDATION, "ema": 0.9},
        {"precision": "float16", "losses": [{"kind": "kl_divergence", "weight": 1000}]},
    ],
    ids=["batch_norm", "float16"],
)
def test_all_ranks_keep_the_same_weights(changes: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, **({"model": BARE} | changes))
    assert train_together(2, recipe) == [(0, "")] * 2
    first, second = (rank["weights"] for rank in seen(recipe, 2))
    assert first == second
    assert 1 < len(set(first)) <= STEPS  # steps that overflow in float16, on any rank, move nothing on all


def test_the_first_rank_alone_writes_to_trackers(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    recipe = student(tmp_path / "run", cache, trackers=[{"kind": "tensorboard"}])
    assert [code for code, _ in train_together(2, recipe)] == [0, 0]
    events = tmp_path / "run/tensorboard"
    assert len(list(events.iterdir())) == 1
    assert [step for step, _ in scalars(events)["loss"]] == [row["step"] for row in metrics(tmp_path / "run")]


def _stop(rank: int) -> None:
    """Ask one rank alone to stop."""
    if rank == 1:
        at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _random(run: Path) -> list[torch.Tensor]:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return [rank["random"]["cpu"] for rank in state["ranks"]]


def test_a_stop_of_one_rank_stops_all_at_one_step_and_resume_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    entries = {"model": DROPOUT, "losses": BOTH, "ema": 0.9, "validation": VALIDATION}
    never = student(tmp_path / "never", cache, **entries)
    assert train_together(3, never) == [(0, "")] * 3
    stopped = student(tmp_path / "stopped", cache, **entries)
    ended = train_together(3, stopped, before=_stop)
    assert [code for code, _ in ended] == [75] * 3
    assert sum("stopped in epoch 2 after step 9" in text for _, text in ended) == 1
    states = _random(tmp_path / "stopped")
    assert not any(torch.equal(states[0], other) for other in states[1:])
    assert train_together(3, stopped, resume=True) == [(0, "")] * 3
    assert weights(tmp_path / "stopped") == weights(tmp_path / "never")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "never")


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_of_a_rank_that_measures_stops_all_and_resume_gives_the_same_bytes(
    asked: int, cache: Path, tmp_path: Path
) -> None:
    entries = {"model": BARE, "validation": VALIDATION}
    assert train_together(2, student(tmp_path / "never", cache, **entries)) == [(0, "")] * 2
    stopped = student(tmp_path / "stopped", cache, **entries)
    each_batch = Validator.each_batch

    def each_batch_stopped(self: Validator, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return each_batch(self, *arguments)

    def before(rank: int) -> None:
        if rank == asked:
            Validator.each_batch = each_batch_stopped  # type: ignore[method-assign]

    ended = train_together(2, stopped, before=before)
    assert [code for code, _ in ended] == [75] * 2
    assert sum("stopped while measuring" in text for _, text in ended) == 1
    assert train_together(2, stopped, resume=True) == [(0, "")] * 2
    assert weights(tmp_path / "stopped") == weights(tmp_path / "never")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "never")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, cache: Path, tmp_path: Path) -> None:
    entries = {"model": BARE, "losses": BOTH}
    train(student(tmp_path / "whole", cache, **entries))
    changed = student(tmp_path / "changed", cache, **entries)
    last = before - 1
    ended = train_together(before, changed, before=lambda rank: _stop(1) if rank == last else None)
    assert [code for code, _ in ended] == [75] * before
    assert train_together(after, changed, resume=True) == [(0, "")] * after
    _close(tmp_path / "changed", tmp_path / "whole")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_with_a_clear_error_and_resume_gives_the_same_bytes(
    victim: int, cache: Path, tmp_path: Path
) -> None:
    entries = {"model": BARE, "checkpoint_steps": 4}
    assert train_together(2, student(tmp_path / "never", cache, **entries)) == [(0, "")] * 2
    recipe = student(tmp_path / "run", cache, **entries)

    def kill(rank: int) -> None:
        if rank == victim:
            at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))

    ended = train_together(2, recipe, before=kill)
    assert ended.pop(victim)[0] == -signal.SIGKILL
    [(code, text)] = ended
    assert code == 2
    assert f"rank {1 - victim} lost another of the 2 processes" in text
    assert "--resume" in text
    assert train_together(2, recipe, resume=True) == [(0, "")] * 2
    assert weights(tmp_path / "run") == weights(tmp_path / "never")


def _fails_on(failing: int) -> Callable[[int], None]:
    def fail() -> None:
        raise DataError("image 7 cannot be read")

    return lambda rank: at_step(3, fail) if rank == failing else None


def _commands(size: int, recipe: Any, tmp_path: Path, before: Callable[[int], object] = lambda rank: None) -> list[str]:
    """Run the command on several ranks; returns what each says on stderr, and checks that all end with code 2."""
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))

    def work(rank: int) -> None:
        before(rank)
        os._exit(main(["train-student", str(file)]))

    ended = together(size, tmp_path / "commands", work)
    assert [code for code, _ in ended] == [2] * size
    return [text for _, text in ended]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_shown_once(failing: int, cache: Path, tmp_path: Path) -> None:
    texts = _commands(2, student(tmp_path / "run", cache, model=BARE), tmp_path, _fails_on(failing))
    assert "".join(texts).count("Error:") == 1
    assert "Error: image 7 cannot be read" in texts[failing]


def test_an_error_of_all_ranks_is_shown_once(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1))
    texts = _commands(2, student(tmp_path / "run", cache), tmp_path)
    assert "".join(texts).count("Error:") == 1
    assert "holds a run already" in texts[0]  # the first alone looks


@pytest.mark.parametrize("size", [2, 3])
def test_losses_that_compare_rows_see_those_of_all_ranks(size: int, featured: Path, tmp_path: Path) -> None:
    losses = [{"kind": kind, **ON_FEATURES[kind]} for kind in ("similarity", "rkd", "pkt", "cka")]
    dynamic = {"kind": "dynamic", "start": 2, "step": 0.25, "min": 1, "max": 6, "margin": 0.1}
    losses = [{"kind": "cross_entropy"}, {"kind": "dist", "temperature": dynamic}, *losses]
    losses = [loss | ({"student": "4:input"} if loss.get("student") == "3:input" else {}) for loss in losses]
    entries = {"model": BARE, "losses": losses}
    train(student(tmp_path / "whole", featured, **entries))
    assert train_together(size, student(tmp_path / "parts", featured, **entries)) == [(0, "")] * size
    _close(tmp_path / "parts", tmp_path / "whole")


def test_a_loss_that_remembers_rows_is_refused(featured: Path, tmp_path: Path) -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "crd", **ON_FEATURES["crd"]}]
    recipe = student(tmp_path / "run", featured, losses=losses)
    texts = [text for code, text in train_together(2, recipe) if code == 2]
    assert len(texts) == 2
    assert sum("losses.1 (crd) remembers every row" in text for text in texts) == 1
    assert not (tmp_path / "run").exists()


def test_what_ranks_cannot_do_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for code, text in train_together(3, student(tmp_path / "run", cache, batch_size=66)) if code == 2]
    assert len(texts) == 3
    assert sum("a batch of 2 images has no part for each of 3 processes" in text for text in texts) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set\. Fix"):
        train(student(tmp_path / "run", cache))
    with pytest.raises(RecipeError, match="device 'mps' cannot serve 2 processes"):
        Ranks(0, 2).use(torch.device("mps"))


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", int(rank))
    with pytest.raises(RecipeError, match="device 'cuda:1' is one for 3 processes"):
        resolve_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="device 'cuda:2' is not available: this machine shows 2 CUDA devices"):
        resolve_device("auto")


def test_torchrun_trains_and_answers_once(cache: Path, tmp_path: Path) -> None:
    entries: dict[str, Any] = {"model": BARE, "losses": BOTH, "epochs": 1, "validation": VALIDATION}
    recipe = student(tmp_path / "run", cache, **entries)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["-m", "logitcache", "train-student", str(tmp_path / "recipe.yaml"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launched = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)
    with Program(*launched, environment=environment) as done:  # it starts cold interpreters
        assert done.wait(120) == 0, done.errors
        assert json.loads(done.out)["steps"] == STEPS // 2
        assert done.errors.count("epoch 1/1  loss") == 1
        assert "arning" not in done.errors
    train(student(tmp_path / "whole", cache, **entries))
    _close(tmp_path / "run", tmp_path / "whole")
