"""Weights and temperatures that change in the course of a run: by the epoch, by the student, by the row."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn

from logitcache.config.recipe import dump_recipe, load_recipe
from logitcache.errors import RecipeError, Stopped
from logitcache.student.learner import Learner
from logitcache.student.losses import DIST, DKD, NKD, WSLD, KLDivergence, Loss, MultiLabelKL, dkd, kl_divergence
from logitcache.student.losses.base import Context, LossBase, Site
from logitcache.student.losses.temperatures import Dynamic, Temperature
from logitcache.student.optim.schedules import Cosine, Exponential, Linear, Progress, Schedule, WarmUp, Weight, constant
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.targets import Batch, MixedLabels, Targets
from tests.student.small import LINEAR, UNLABELLED, fill, metrics, recorded_losses, student, weights

STEPS, EPOCHS = 4, 6
TIMES = np.arange(STEPS * EPOCHS + 1) / STEPS
SITE = Site({}, {}, 9)
DYNAMIC = {"kind": "dynamic", "start": 2.0, "step": 0.25, "margin": 0.5, "min": 1.0, "max": 3.0}

FORMULAS: list[tuple[Schedule, Any]] = [
    (constant(3.0), np.full_like(TIMES, 3.0)),
    (Linear(start=8.0, stop=2.0), 8 - 6 * TIMES / EPOCHS),
    (Linear(start=0.0, stop=2.0, epochs=2.5), 2 * np.minimum(1, TIMES / 2.5)),
    (Linear(start=8.0, stop=2.0, epochs=24), 8 - 6 * TIMES / 24),
    (Cosine(start=8.0, stop=2.0), 5 + 3 * np.cos(np.pi * TIMES / EPOCHS)),
    (Cosine(start=1.0, stop=4.0, epochs=3), 2.5 - 1.5 * np.cos(np.pi * np.minimum(1, TIMES / 3))),
    (Exponential(start=4.0, decay=0.5), 4 * 0.5**TIMES),
    (Exponential(start=4.0, decay=0.5, floor=1.0), np.maximum(1, 4 * 0.5**TIMES)),
    (WarmUp(value=5.0, epochs=1.5), 5 * np.minimum(1, TIMES / 1.5)),
]


@pytest.mark.parametrize(("schedule", "expected"), FORMULAS, ids=lambda value: getattr(value, "kind", ""))
def test_a_schedule_is_its_formula_at_every_step(schedule: Schedule, expected: Any) -> None:
    found = [schedule.at(Progress(step, STEPS, EPOCHS)) for step in range(len(TIMES))]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert min(found) >= schedule.bounds[0]
    assert all(isinstance(value, float) for value in found)


def test_a_temperature_that_decays_is_above_0_for_ever() -> None:
    assert Exponential(start=4.0, decay=0.1).at(Progress(10**9, 1, 1)) > 0


class Entry(BaseModel):
    temperature: Temperature = constant(1.0)
    weight: Weight = constant(1.0)


@pytest.mark.parametrize("written", [4.0, 0.25, {"kind": "linear", "start": 8.0, "stop": 1.0, "epochs": 10.0}, DYNAMIC])
def test_the_stored_form_is_what_was_written(written: Any) -> None:
    entry = load_recipe({"temperature": written}, Entry)
    stored = json.loads(entry.model_dump_json())
    assert stored == {"temperature": written, "weight": 1.0}
    assert load_recipe(stored, Entry) == entry


def test_a_constant_is_stored_as_the_number_that_it_is() -> None:
    entry = load_recipe({"temperature": {"kind": "constant", "value": 3}, "weight": "3e-4"}, Entry)
    assert entry == Entry(temperature=constant(3.0), weight=constant(3e-4))
    assert load_recipe({}, Entry, ["temperature=3", "weight=3e-4"]) == entry
    assert dump_recipe(entry) == "temperature: 3.0\nweight: 0.0003\n"


@pytest.mark.parametrize(
    ("temperature", "match"),
    [
        (0, r"key 'temperature' = 0: must be greater than 0 at all times"),
        (-2, "must be greater than 0 at all times"),
        ({"kind": "linear", "start": 8, "stop": 0}, "must be greater than 0 at all times"),
        ({"kind": "warm_up", "value": 4, "epochs": 2}, "must be greater than 0 at all times"),
        ({"kind": "cosine", "start": -1, "stop": 4}, "must be greater than 0 at all times"),
        ({"kind": "linear", "start": 8, "stop": 1, "epochs": 0}, r"'temperature.epochs' = 0: must be greater than 0"),
        (
            {"kind": "exponential", "start": 8, "decay": 1.5},
            r"'temperature.decay' = 1.5: must be less than or equal to 1",
        ),
        ({"kind": "linera", "start": 8, "stop": 1}, "unknown kind; did you mean 'linear'"),
        ({"start": 8}, "key 'temperature.kind' is missing; use one of 'constant', 'linear'"),
        ("hot", "must be a number, or a schedule such as {kind: linear"),
        (True, "must be a number, or a schedule"),
        ([4], "must be a number, or a schedule"),
        (math.nan, "must be a number, or a schedule"),
        (DYNAMIC | {"start": 4}, r"start \(4\) must be from min \(1\) to max \(3\)"),
        (DYNAMIC | {"min": 0}, r"'temperature.min' = 0: must be greater than 0"),
        (DYNAMIC | {"step": -1}, r"'temperature.step' = -1: must be greater than 0"),
        ({"kind": "by_confidence", "low": 1, "high": 4}, "unknown kind"),
    ],
    ids=repr,
)
def test_a_temperature_that_makes_no_sense_is_refused(temperature: Any, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe({"temperature": temperature}, Entry)


@pytest.mark.parametrize(
    "weight", [-1, {"kind": "linear", "start": 1, "stop": -1}, {"kind": "warm_up", "value": -1, "epochs": 1}]
)
def test_a_negative_weight_is_refused(weight: Any) -> None:
    with pytest.raises(RecipeError, match="must be 0 or more at all times"):
        load_recipe({"weight": weight}, Entry)


def _random(seed: int, rows: int = 9, classes: int = 5) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def _batch(teacher: Tensor, labels: Tensor | None = None, mixed: MixedLabels | None = None) -> Batch:
    rows, classes = teacher.shape
    labels = torch.arange(rows) % classes if labels is None else labels
    images = torch.zeros(rows, 1, 1, 1, dtype=torch.uint8)
    return Batch(images, labels, torch.zeros(rows, 2), {"t": Targets(teacher)}, mixed)


def _context(step: int, adapter: nn.Module | None = None) -> Context:
    return Context(adapter or nn.Identity(), Progress(step, STEPS, EPOCHS))


@pytest.mark.parametrize("kind", get_args(get_args(Loss)[0]))
def test_the_weight_of_every_loss_takes_a_schedule(kind: type[LossBase]) -> None:
    assert isinstance(kind.model_fields["weight"].default, Schedule)
    schema = str(kind.model_json_schema()["properties"]["weight"])
    assert all(schedule in schema for schedule in ("constant", "linear", "cosine", "exponential", "warm_up"))


SOFTENED: tuple[type[Any], ...] = (KLDivergence, DKD, NKD, WSLD, DIST, MultiLabelKL)


@pytest.mark.parametrize("kind", SOFTENED)
@pytest.mark.parametrize("step", [0, 7, 24])
def test_every_temperature_follows_its_schedule(kind: type[Any], step: int) -> None:
    schedule = Linear(start=5.0, stop=1.5)
    loss, fixed = kind(temperature=schedule), kind(temperature=5 - 3.5 * step / 24)
    batch, outputs = _batch(_random(1)), Targets(_random(2))
    torch.testing.assert_close(loss(outputs, batch, _context(step)), fixed(outputs, batch, _context(step)))


@pytest.mark.parametrize("kind", SOFTENED)
def test_every_temperature_may_be_dynamic(kind: type[Any]) -> None:
    loss: LossBase = kind(temperature=DYNAMIC)
    batch, student = _batch(_random(1)), _random(2).requires_grad_()
    context = _context(0, loss.adapter(SITE))
    value = loss(Targets(student), batch, context)
    torch.testing.assert_close(value, kind(temperature=2.0)(Targets(student), batch, _context(0)))
    assert value.shape == ()
    loss(Targets(student), batch, _context(1, context.adapter))
    value.backward()  # the next step has moved the temperature, not what this one was computed with
    assert student.grad is not None
    assert loss.needs & {"labels", "single labels"}


def test_the_weights_within_a_loss_follow_their_schedules() -> None:
    student, teacher = _random(2), _random(1)
    loss = DKD(alpha=Linear(start=1.0, stop=0.0), beta=WarmUp(value=8.0, epochs=3), temperature=2.0)
    found = loss(Targets(student), _batch(teacher), _context(6))
    torch.testing.assert_close(found, dkd(student, teacher, torch.arange(9) % 5, alpha=0.75, beta=4.0, temperature=2.0))
    value = DIST(beta=WarmUp(value=2.0, epochs=1), gamma=0.0)(Targets(student), _batch(teacher), _context(2))
    torch.testing.assert_close(value, DIST(gamma=0.0)(Targets(student), _batch(teacher), _context(0)))
    value = NKD(gamma=Linear(start=0.0, stop=3.0))(Targets(student), _batch(teacher), _context(12))
    torch.testing.assert_close(value, NKD()(Targets(student), _batch(teacher), _context(0)))


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (5.0, 2.0), (3.0, 3.0)])
def test_the_temperature_of_a_row_goes_by_the_teachers_confidence(low: float, high: float) -> None:
    student, teacher = _random(2), _random(1)
    rows = []
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        temperature = low + (high - low) * (np.exp(t) / np.exp(t).sum()).max()
        p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (t, s))
        rows.append(temperature**2 * np.sum(p * np.log(p / q)))
    loss = KLDivergence(temperature={"kind": "by_confidence", "low": low, "high": high})
    found = loss(Targets(student), _batch(teacher), _context(0))
    np.testing.assert_allclose(found.item(), np.mean(rows), rtol=1e-5)
    assert loss(Targets(teacher), _batch(teacher), _context(0)) == 0


def test_the_gradient_at_a_temperature_for_each_row_is_that_of_the_value() -> None:
    student, teacher = _random(2).double().requires_grad_(), _random(1).double()
    temperatures = torch.linspace(0.5, 6, 9)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(z, teacher, temperatures), student)


def _gap(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """The mean cross-entropy of the student less that of the teacher, in float64."""
    rows = np.flatnonzero(labels.numpy() >= 0)
    s, t = (
        -np.log(np.exp(z) / np.exp(z).sum(axis=1, keepdims=True))[rows, labels.numpy()[rows]]
        for z in (student.double().numpy(), teacher.double().numpy())
    )
    return float(np.mean(s - t)) if len(rows) else 0.0


@pytest.mark.parametrize("size", [9, 4, 1])
def test_a_dynamic_temperature_follows_the_gap_of_the_step_before(size: int) -> None:
    """Whatever the number of micro-batches; rows without a label say nothing."""
    loss = KLDivergence(temperature=DYNAMIC)
    adapter = loss.adapter(SITE)
    expected, found, gaps = 2.0, [], []
    for step in range(40):
        # The student leads at first, then they are close, then it lags.
        scale = (4.0, 1.1, 0.3)[step // 14]
        teacher, labels = _random(step), (torch.arange(9) * step) % 6 - 1
        student = teacher * scale + 2 * (scale - 1) * torch.nn.functional.one_hot(labels.clamp(min=0), 5)
        whole = _batch(teacher, labels)
        for start in range(0, 9, size):
            rows = slice(start, start + size)
            loss(Targets(student[rows]), whole[rows], _context(step, adapter))
            assert adapter.temperature.item() == pytest.approx(expected, abs=1e-6)
        found.append(expected)
        gaps.append(_gap(student, teacher, labels))
        expected += 0.25 * ((gaps[-1] > 0.5) - (gaps[-1] < 0))
        expected = min(3.0, max(1.0, expected))
    assert {1.0, 3.0} <= set(found)  # it came to both ends
    assert any(0 <= gap <= 0.5 for gap in gaps)


def test_a_dynamic_temperature_stays_while_nothing_is_trained_and_where_there_are_no_labels() -> None:
    loss = KLDivergence(temperature=DYNAMIC)
    adapter = loss.adapter(SITE)
    behind, unlabelled = _batch(-_random(1)), _batch(_random(1), torch.full((9,), -1))
    for step in range(4):
        loss(Targets(_random(1)), unlabelled, _context(step, adapter))
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.eval()
    for step in range(4, 8):
        loss(Targets(_random(1)), behind, _context(step, adapter))
    assert all(torch.equal(before[name], value) for name, value in adapter.state_dict().items())
    assert before["temperature"] == 2.0


def test_a_dynamic_temperature_survives_a_loss_that_is_not_a_number() -> None:
    loss = KLDivergence(temperature=DYNAMIC)
    adapter = loss.adapter(SITE)
    student = torch.full((9, 5), torch.nan)
    loss(Targets(student), _batch(_random(1)), _context(0, adapter))
    loss(Targets(_random(1)), _batch(_random(1)), _context(1, adapter))
    assert adapter.temperature == 2.0
    assert adapter.gap.isfinite()


def test_a_dynamic_temperature_goes_by_mixed_labels() -> None:
    loss = KLDivergence(temperature=DYNAMIC | {"margin": 0.0})
    teacher, partners = _random(1), torch.arange(9).flip(0) % 5
    # Of the partners' labels, which count for nine tenths, the student knows more.
    student = (
        teacher + 5 * torch.nn.functional.one_hot(partners, 5) - torch.nn.functional.one_hot(torch.arange(9) % 5, 5)
    )
    adapter = loss.adapter(SITE)
    for step in range(2):
        batch = _batch(teacher, mixed=MixedLabels(partners, torch.full((9,), 0.1)))
        loss(Targets(student), batch, _context(step, adapter))
    assert adapter.temperature == 1.75


def test_a_dynamic_temperature_is_kept_in_float32() -> None:
    adapter = Dynamic.model_validate(DYNAMIC).memory()
    assert {name: value.dtype for name, value in adapter.state_dict().items()} == {
        "temperature": torch.float32,
        "gap": torch.float32,
        "rows": torch.float32,
        "step": torch.int64,
    }


CHANGING: dict[str, Any] = {
    "losses": [
        {"kind": "kl_divergence", "temperature": DYNAMIC | {"margin": 0.1}},
        {"kind": "kl_divergence", "temperature": {"kind": "by_confidence", "low": 1.0, "high": 3.0}},
        {
            "kind": "dkd",
            "temperature": {"kind": "cosine", "start": 8.0, "stop": 1.0},
            "weight": {"kind": "warm_up", "value": 1.0, "epochs": 1},
        },
        {"kind": "cross_entropy", "weight": {"kind": "exponential", "start": 1.0, "decay": 0.5}},
    ],
    "checkpoint_steps": 1,
}


def _stopped_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ask for a stop while the losses of one step are added up."""
    add, calls = Learner.add, itertools.count(1)

    def counted(self: Learner, terms: Tensor, rows: Tensor) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, terms, rows)

    monkeypatch.setattr(Learner, "add", counted)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_stop_changes_nothing_of_what_changes_in_a_run(
    cache: Path, tmp_path: Path, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CHANGING | {"micro_batches": micro_batches}
    with recorded_losses() as whole:
        train(student(tmp_path / "whole", cache, **changes))
    recipe = student(tmp_path / "parts", cache, **changes)
    with recorded_losses() as parts:
        for call in (3 * micro_batches, 2 * micro_batches, 5 * micro_batches):
            with monkeypatch.context() as patch:
                _stopped_at(patch, call)
                with pytest.raises(Stopped):
                    train(recipe, resume=True)
        train(recipe, resume=True)
    assert parts == whole
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert any(key.endswith("temperature") and value != 2.0 for key, value in _flat(saved))


def _flat(state: Any, key: str = "") -> Any:
    if not isinstance(state, dict):
        yield key, state
        return
    for name, value in state.items():
        yield from _flat(value, f"{key}.{name}")


def test_micro_batches_share_one_dynamic_temperature(cache: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": LINEAR, "optimizer": {"kind": "sgd"}}
    changes["losses"] = [{"kind": "kl_divergence", "temperature": DYNAMIC}]
    runs = [tmp_path / "whole", tmp_path / "parts"]
    for count, run in enumerate(runs, start=1):
        train(student(run, cache, **changes, micro_batches=count))
    first, second = (load_file(run / "weights.safetensors") for run in runs)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


def test_the_loop_multiplies_by_the_weight_of_the_step(cache: Path, tmp_path: Path) -> None:
    losses = [
        {"kind": "cross_entropy"},
        {"kind": "cross_entropy", "weight": {"kind": "linear", "start": 1.0, "stop": 0.5, "epochs": 1}},
    ]
    with recorded_losses() as terms:
        result = train(student(tmp_path / "run", cache, losses=losses))
    per_epoch = result.steps // 2
    ratios = [scheduled / plain for plain, scheduled in terms]
    expected = [1 - 0.5 * min(1.0, step / per_epoch) for step in range(result.steps)]
    np.testing.assert_allclose(ratios, expected, rtol=1e-6)


def test_a_run_keeps_the_recipe_as_it_was_written(cache: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", cache, epochs=1, **CHANGING)
    train(recipe)
    path = tmp_path / "run" / "recipe.yaml"
    kept = load_recipe(path, StudentRecipe)
    decided = {name: getattr(kept, name) for name in ("channels_last", "fused")}  # how it computes, which a rule says
    assert {type(value) for value in decided.values()} == {bool}
    assert kept == recipe.model_copy(update=decided)
    stored = load_recipe(path, StudentRecipe).model_dump(mode="json")["losses"]
    for written, entry in zip(CHANGING["losses"], stored, strict=True):
        for key, value in written.items():
            kept = entry[key]
            assert {name: kept[name] for name in value} == value if isinstance(value, dict) else kept == value


def test_a_dynamic_temperature_without_any_label_is_refused(caches: Path, tmp_path: Path) -> None:
    path = fill(caches / "unlabelled_dynamic", images=UNLABELLED)
    losses = [{"kind": "kl_divergence", "temperature": DYNAMIC}]
    with pytest.raises(RecipeError, match=r"losses.0 \(kl_divergence\) needs labels, the cache's images have none"):
        train(student(tmp_path / "run", path, dataset=UNLABELLED, losses=losses))


def test_metrics_hold_the_weights_and_temperatures_of_the_last_step_of_an_epoch(cache: Path, tmp_path: Path) -> None:
    losses = [
        {"kind": "kl_divergence", "temperature": {"kind": "linear", "start": 5, "stop": 1}, "weight": 0.5},
        {
            "kind": "dkd",
            "beta": {"kind": "warm_up", "value": 8, "epochs": 1},
            "temperature": DYNAMIC | {"step": 0.01, "margin": 0.0},
        },
        {"kind": "kl_divergence", "temperature": {"kind": "by_confidence", "low": 1, "high": 2}},
    ]
    train(student(tmp_path / "run", cache, losses=losses, model=LINEAR))
    rows, steps = metrics(tmp_path / "run"), 7
    for epoch, row in enumerate(rows):
        done = epoch + (steps - 1) / steps
        assert row["temperature_0_kl_divergence"] == pytest.approx(5 - 4 * done / 2)
        assert row["beta_1_dkd"] == pytest.approx(8 * min(1, done))
        assert (row["weight_0_kl_divergence"], row["alpha_1_dkd"], row["weight_2_kl_divergence"]) == (0.5, 1.0, 1.0)
        assert 1 <= row["temperature_1_dkd"] <= 3
        assert "temperature_2_kl_divergence" not in row
    assert rows[0]["temperature_1_dkd"] != rows[1]["temperature_1_dkd"]
    head = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "temperature_0_kl_divergence" in head
