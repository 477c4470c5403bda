"""The training loop: what it computes and what it writes."""

import csv
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from logitcache.cache.cache import Cache, open_cache
from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError, LogitCacheError, MismatchError
from logitcache.models import Run, load_model, read_stored
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.learner import Learner
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.targets import Targets
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.keys import ViewKey
from tests.student.small import (
    AUGMENTATIONS,
    DROPOUT,
    LINEAR,
    NUM_IMAGES,
    PARTLY,
    TEST_IMAGES,
    TINY,
    metrics,
    recorded_losses,
    student,
    teacher,
    top1,
    weights,
)

SGD = {"kind": "sgd", "lr": 0.05}
BOTH = [{"kind": "kl_divergence"}, {"kind": "cross_entropy", "weight": 0.5}]


def _final(result: RunResult) -> dict[str, Tensor]:
    return load_file(Path(result.out, "weights.safetensors"))


def _assert_close(first: RunResult, second: RunResult, tolerance: float = 1e-6) -> None:
    for name, value in _final(first).items():
        torch.testing.assert_close(value, _final(second)[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [3, 4, 32])
@pytest.mark.parametrize("optimizer", [SGD, {"kind": "adamw"}], ids=lambda o: o["kind"])
def test_micro_batches_compute_what_one_batch_computes(
    count: int, optimizer: dict[str, Any], partly: Path, tmp_path: Path
) -> None:
    entries = {"model": LINEAR, "optimizer": optimizer, "losses": BOTH, "dataset": PARTLY, "epochs": 1}
    whole = train(student(tmp_path / "whole", partly, **entries))
    parts = train(student(tmp_path / "parts", partly, micro_batches=count, **entries))
    _assert_close(whole, parts, 1e-6 if optimizer is SGD else 1e-4)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-5)


def test_the_loss_of_an_epoch_is_the_mean_over_the_rows_that_have_one(partly: Path, tmp_path: Path) -> None:
    optimizer = SGD | {"lr": 1e-12}
    entries = {"model": LINEAR, "dataset": PARTLY, "losses": BOTH, "optimizer": optimizer, "epochs": 1}
    train(student(tmp_path / "small", partly, **entries))
    train(student(tmp_path / "large", partly, **entries, batch_size=NUM_IMAGES))
    small, large = metrics(tmp_path / "small")[0], metrics(tmp_path / "large")[0]
    for key in ("loss", "loss_0_kl_divergence", "loss_1_cross_entropy"):
        assert small[key] == pytest.approx(large[key], rel=1e-5)
    assert small["loss"] == pytest.approx(small["loss_0_kl_divergence"] + small["loss_1_cross_entropy"])


def test_every_epoch_tells_its_own_loss(cache: Path, tmp_path: Path) -> None:
    with recorded_losses() as terms:
        train(student(tmp_path / "run", cache))
    sizes = [32] * 6 + [8]
    for row, losses in zip(metrics(tmp_path / "run"), (terms[:7], terms[7:]), strict=True):
        assert row["loss"] == pytest.approx(np.average(np.array(losses)[:, 0], weights=sizes))


def test_a_short_last_batch_is_trained_on_unless_dropped(cache: Path, tmp_path: Path) -> None:
    kept = train(student(tmp_path / "kept", cache))
    dropped = train(student(tmp_path / "dropped", cache, drop_last=True))
    assert (kept.steps, kept.images) == (2 * 7, 2 * 200)
    assert (dropped.steps, dropped.images) == (2 * 6, 2 * 192)
    assert weights(kept) != weights(dropped)


def test_the_loop_computes_what_a_loop_of_ones_own_computes(cache: Path, tmp_path: Path) -> None:
    options = {"model": LINEAR, "optimizer": SGD, "clip_norm": 0.2, "ema": 0.7, "schedule": {"warmup_epochs": 1}}
    result = train(student(tmp_path / "run", cache, epochs=6, seed=5, **options))
    torch.manual_seed(5)
    module = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))
    groups = [{"params": [module[2].weight], "weight_decay": 5e-4}, {"params": [module[2].bias], "weight_decay": 0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    loader = open_cache(cache).loader(batch_size=32, seed=5)
    average: list[Tensor] = []
    for step, batch in enumerate(batch for epoch in range(6) for batch in loader.epoch(epoch)):
        factor = (step + 1) / 7 if step < 7 else (1 + np.cos(np.pi * (step - 7) / 35)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor
        logits = module((batch.images / 255 - 0.5) / 0.5)
        p = torch.softmax(batch.targets.logits, dim=1)
        loss = (p * (p.log() - torch.log_softmax(logits, dim=1))).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.2)
        optimizer.step()
        now = [p.detach().clone() for p in module.parameters()]
        keep = min(0.7, (1 + step) / (10 + step)) if step else 0.0
        average = [a + (1 - keep) * (b - a) for a, b in zip(average or now, now, strict=True)]
    final = _final(result)
    torch.testing.assert_close(final["2.weight"], average[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(final["2.bias"], average[1], rtol=0, atol=1e-6)


def test_the_average_is_what_is_measured_and_kept(cache: Path, tmp_path: Path) -> None:
    validation = {"dataset": TEST_IMAGES}
    plain = train(student(tmp_path / "plain", cache, validation=validation))
    averaged = train(student(tmp_path / "averaged", cache, ema=0.9, validation=validation))
    state = torch.load(Path(averaged.out, "checkpoint.pt"), weights_only=True)
    kept = _final(averaged)
    for name, value in kept.items():
        torch.testing.assert_close(state["ema"][f"module.module.{name}"], value, rtol=0, atol=0)
        torch.testing.assert_close(state["model"][f"module.{name}"], _final(plain)[name], rtol=0, atol=0)
    assert any(not torch.equal(value, _final(plain)[name]) for name, value in kept.items())
    assert averaged.top1 == pytest.approx(top1(tmp_path / "averaged"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions_train_to_about_the_same(precision: str, cache: Path, tmp_path: Path) -> None:
    full = train(student(tmp_path / "full", cache))
    lower = train(student(tmp_path / "lower", cache, precision=precision))
    assert weights(full) != weights(lower)
    assert lower.loss == pytest.approx(full.loss, rel=0.02)
    assert {value.dtype for value in _final(lower).values()} == {torch.float32, torch.int64}


def test_clipping_sees_the_gradients_without_the_scale_of_float16(cache: Path, tmp_path: Path) -> None:
    entries = {"model": LINEAR, "optimizer": SGD | {"weight_decay": 0}, "clip_norm": 1e-3, "epochs": 1}
    full = train(student(tmp_path / "full", cache, **entries))
    lower = train(student(tmp_path / "lower", cache, precision="float16", **entries))
    _assert_close(full, lower, 1e-4)


def test_channels_last_computes_about_the_same(cache: Path, tmp_path: Path) -> None:
    plain = train(student(tmp_path / "plain", cache, optimizer=SGD, epochs=1, channels_last=False))
    last = train(student(tmp_path / "last", cache, optimizer=SGD, epochs=1, channels_last=True))
    _assert_close(plain, last, 1e-3)


def test_compiled_models_train_and_keep_plain_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    calls: list[Any] = []

    def eager(module: nn.Module, **options: Any) -> Any:
        calls.append(options)
        return compiled(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    result = train(student(tmp_path / "compiled", cache, compile=True, ema=0.9, epochs=1))
    plain = train(student(tmp_path / "plain", cache, ema=0.9, epochs=1))
    assert calls == [{"dynamic": False}]
    assert _final(result).keys() == _final(plain).keys()
    _assert_close(result, plain, 1e-5)


def test_every_epoch_trains_in_training_mode(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    add = Learner.add

    def spy(self: Learner, terms: Tensor, rows: Tensor) -> None:
        modes.append(all(module.training for module in self.model.modules()))
        add(self, terms, rows)

    monkeypatch.setattr(Learner, "add", spy)
    train(student(tmp_path / "run", cache, validation={"dataset": TEST_IMAGES}, epochs=3))
    assert modes == [True] * 21


@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_a_loss_that_diverges_is_an_error_and_spoils_no_checkpoint(
    checkpoint_steps: int | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = student(tmp_path / "run", cache, model=LINEAR, epochs=4, checkpoint_steps=checkpoint_steps)
    _spoil_at(17, monkeypatch)
    with pytest.raises(LogitCacheError, match=r"epoch 3, step \d+: .*no longer finite.*Fix: .*optimizer.lr"):
        train(recipe)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["place"][0] == (14 if checkpoint_steps is None else 16)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert len(metrics(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("checkpoint_steps", [None, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", ["logits", "features"])
def test_numbers_of_the_cache_that_are_none_are_not_blamed_on_the_learning_rate(
    target: str,
    value: float,
    checkpoint_steps: int | None,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Cache.rows

    def spoiled(self: Cache, keys: Sequence[ViewKey]) -> Mapping[str, Targets]:
        logits = rows(self, keys)["net"].logits.clone()
        features = torch.ones(len(keys), 3)
        spoil = logits if target == "logits" else features
        spoil[[row for row, key in enumerate(keys) if target == "features" or key.index == 77]] = value
        return {"net": Targets(logits, {"f": features})}

    monkeypatch.setattr(Cache, "rows", spoiled)
    if target == "features":
        add = Learner.add
        monkeypatch.setattr(Learner, "add", lambda self, terms, rows: add(self, terms * float("nan"), rows))
    recipe = student(tmp_path / "run", cache, model=LINEAR, epochs=3, checkpoint_steps=checkpoint_steps)
    named = "logits" if target == "logits" else "features 'f'"
    with pytest.raises(CacheError, match=rf"{named} of teacher 'net' hold NaN or infinity for image .* \(view 0\)"):
        train(recipe)


def _spoil_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add, count = Learner.add, iter(range(1, 1000))

    def spoiled(self: Learner, terms: Tensor, rows: Tensor) -> None:
        add(self, terms * (float("nan") if next(count) == step else 1), rows)

    monkeypatch.setattr(Learner, "add", spoiled)


def test_weights_that_diverge_in_the_last_step_are_not_kept(cache: Path, tmp_path: Path) -> None:
    losses = [{"kind": "kl_divergence", "weight": 1e6}]
    entries = {"model": LINEAR, "losses": losses, "optimizer": SGD | {"lr": 1e38}}
    recipe = student(tmp_path / "run", cache, epochs=1, batch_size=200, **entries)
    with recorded_losses() as terms, pytest.raises(LogitCacheError, match="no longer finite"):
        train(recipe)
    assert np.isfinite(terms).all()
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_the_callers_random_state_is_untouched(cache: Path, tmp_path: Path) -> None:
    def states() -> list[Any]:
        numpy_state = np.random.get_state(legacy=False)
        return [torch.get_rng_state().tolist(), json.dumps(numpy_state, default=np.ndarray.tolist), random.getstate()]

    before = states()
    train(student(tmp_path / "run", cache, model=DROPOUT, num_workers=1, start_method="fork", epochs=1))
    assert states() == before
    with pytest.raises(MismatchError):
        train(student(tmp_path / "wrong", cache, model=LINEAR | {"arguments": {"num_classes": 7}}))
    assert states() == before


def test_the_callers_random_state_does_not_matter_but_the_seed_does(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(student(tmp_path / "first", cache, model=DROPOUT, epochs=1))
    torch.manual_seed(2)
    second = train(student(tmp_path / "second", cache, model=DROPOUT, epochs=1))
    third = train(student(tmp_path / "third", cache, model=DROPOUT, epochs=1, seed=1))
    assert weights(first) == weights(second)
    assert weights(first) != weights(third)


def test_workers_change_nothing(cache: Path, tmp_path: Path) -> None:
    validation = {"dataset": TEST_IMAGES, "batch_size": 30}
    here = train(student(tmp_path / "here", cache, validation=validation))
    entries = {"num_workers": 2, "start_method": "fork", "validation": validation}
    there = train(student(tmp_path / "there", cache, **entries))
    assert weights(here) == weights(there)
    assert metrics(tmp_path / "here") == metrics(tmp_path / "there")


def test_a_run_directory_tells_all_of_the_run(cache: Path, tmp_path: Path) -> None:
    validation = {"dataset": TEST_IMAGES, "every": 2}
    recipe = student(tmp_path / "run", cache, losses=BOTH, epochs=3, validation=validation)
    result = train(recipe)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "environment.json",
        "metrics.csv",
        "metrics.jsonl",
        "checkpoint.pt",
        "model.json",
        "evaluation.json",
        "weights.safetensors",
        "result.json",
    }
    settled = recipe.model_copy(update={"channels_last": True, "fused": True})
    assert load_recipe(run / "recipe.yaml", StudentRecipe) == settled
    assert json.loads((run / "result.json").read_text()) == dataclasses.asdict(result)
    environment = json.loads((run / "environment.json").read_text())
    manifest = open_cache(cache).manifest
    learnt = manifest.restricted(manifest.views.num_views, manifest.targets)
    assert environment["learns_from"]["cache"] == learnt.content_digest()
    assert environment["learns_from"]["validation"]["dataset"]["num_images"] == 100
    assert "torch" in environment["versions"][0]
    stored = read_stored(run / "model.json")
    assert (stored.num_classes, stored.in_channels, stored.model.kind) == (10, 1, "small_cnn")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 7), (1, 14), (2, 21)]
    assert ["val_top1" in row for row in rows] == [False, True, True]
    assert result.top1 == rows[2]["val_top1"]
    assert result.best_top1 == max(rows[1]["val_top1"], rows[2]["val_top1"])
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert result.num_parameters == sum(p.numel() for p in load_model(run).module.parameters())
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: v for k, v in row.items() if v != ""} for row in table] == [
        {key: str(value) for key, value in row.items()} for row in rows
    ]


def test_a_top_k_cache_serves_kl_divergence(top_k: Path, tmp_path: Path) -> None:
    losses = [{"kind": "kl_divergence", "temperature": 2.0}]
    result = train(student(tmp_path / "run", top_k, losses=losses, epochs=4, optimizer={"kind": "adamw", "lr": 0.01}))
    rows = metrics(tmp_path / "run")
    assert result.loss < 0.7 * rows[0]["loss"]


def test_partly_labelled_images_teach_what_their_labels_say(tmp_path: Path) -> None:
    result = train(teacher(tmp_path / "run", dataset=PARTLY, epochs=3, optimizer={"kind": "adamw", "lr": 0.01}))
    assert result.loss < metrics(tmp_path / "run")[0]["loss"]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learnt") / "teacher"
    recipe = teacher(
        out,
        model=TINY | {"width": 8},
        dataset={"kind": "bundled", "num_images": 2000},
        augmentations=AUGMENTATIONS,
        epochs=3,
        batch_size=64,
        optimizer={"kind": "adamw", "lr": 0.01},
        ema=0.9,
        validation={"dataset": {"kind": "bundled", "split": "test", "num_images": 500}},
    )
    result = train(recipe)
    assert result.top1 is not None
    assert result.top1 > 0.6
    settled = recipe.model_copy(update={"channels_last": True, "fused": True})
    assert load_recipe(out / "recipe.yaml", TeacherRecipe) == settled
    return out


def test_a_teacher_of_our_own_teaches(learnt: Path, tmp_path: Path) -> None:
    entries = {
        "cache": str(tmp_path / "cache"),
        "dataset": {"kind": "bundled", "num_images": 500},
        "teachers": {"ours": {"model": {"kind": "run", "path": str(learnt)}}},
        "num_workers": 0,
        "device": "cpu",
    }
    precompute(PrecomputeRecipe.model_validate_json(json.dumps(entries)))
    images = open_dataset(Bundled(num_images=500))
    logits = open_cache(tmp_path / "cache").rows([(0, index) for index in range(500)])["ours"].logits  # type: ignore[misc]
    assert (logits.argmax(dim=1).numpy() == images.labels).mean() > 0.6
    options = {"kind": "adamw", "lr": 0.01}
    result = train(student(tmp_path / "run", tmp_path / "cache", epochs=8, optimizer=options))
    assert result.loss < 0.8 * metrics(tmp_path / "run")[0]["loss"]


def test_a_run_can_start_from_another(learnt: Path, cache: Path, tmp_path: Path) -> None:
    model = Run(path=str(learnt)).model_dump(mode="json")
    optimizer = SGD | {"lr": 1e-12, "weight_decay": 0.0}
    result = train(student(tmp_path / "run", cache, model=model, optimizer=optimizer, epochs=1))
    for name, value in load_file(learnt / "weights.safetensors").items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(_final(result)[name], value)


def test_a_stranger_to_the_main_thread_may_train(cache: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, student(tmp_path / "run", cache, epochs=1)).result().steps == 7
