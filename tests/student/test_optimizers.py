"""Optimisers: what decays, and the learning rate at every step."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from logitcache.errors import RecipeError
from logitcache.models import SmallCNN
from logitcache.student.optim.optimizers import SGD, AdamW, LearningRateSchedule, parameter_groups


@pytest.mark.parametrize("optimizer", [SGD(weight_decay=0.3), AdamW(weight_decay=0.3)], ids=lambda o: o.kind)
def test_weights_decay_and_biases_and_normalisation_do_not(optimizer: SGD | AdamW) -> None:
    module = SmallCNN(width=4).build(10, 1).module
    decay = {id(p): group["weight_decay"] for group in optimizer.build(module).param_groups for p in group["params"]}
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    plain = {id(p) for m in norms for p in m.parameters()} | {
        id(p) for name, p in module.named_parameters() if name.endswith("bias")
    }
    assert norms
    assert decay == {id(p): 0.0 if id(p) in plain else 0.3 for p in module.parameters()}


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    held = [p for group in parameter_groups(module, 0.1) for p in group["params"]]  # type: ignore[attr-defined]
    assert {id(p) for p in held} == {id(p) for p in module[1].parameters()}


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="no parameter to train"):
        AdamW().build(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(RecipeError, match="no parameter to train"):
        SGD().build(nn.Flatten())


def test_the_recipe_reaches_the_optimizer() -> None:
    module = nn.Linear(2, 2)
    sgd = SGD(lr=0.3, momentum=0.8).build(module).defaults
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"]) == (0.3, 0.8, True)
    adamw = AdamW(lr=0.01, betas=(0.8, 0.95)).build(module).defaults
    assert (adamw["lr"], adamw["betas"]) == (0.01, (0.8, 0.95))


def test_sgd_without_momentum_is_plain() -> None:
    assert SGD(momentum=0.0).build(nn.Linear(2, 2)).defaults["nesterov"] is False


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_that_never_forget_are_refused_with_the_recipe(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError):
        AdamW(betas=betas)


def _factors(schedule: LearningRateSchedule, steps: int, epochs: int) -> list[float]:
    return [schedule.factor(step, steps, epochs) for step in range(steps * epochs + 1)]


def test_the_learning_rate_falls_from_the_first_step_to_the_end() -> None:
    factors = _factors(LearningRateSchedule(final_lr=0.1), 10, 3)
    assert factors[0] == 1.0
    assert factors[15] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    factors = _factors(LearningRateSchedule(warmup_epochs=0.5), 10, 3)
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.0)


def test_warm_up_may_be_longer_than_the_training() -> None:
    assert _factors(LearningRateSchedule(warmup_epochs=4), 5, 2) == pytest.approx(
        [(step + 1) / 20 for step in range(11)]
    )


def test_one_step_of_training_has_the_full_rate() -> None:
    assert LearningRateSchedule().factor(0, 1, 1) == 1.0
    assert LearningRateSchedule(warmup_epochs=1).factor(0, 1, 1) == 1.0


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (1, 0.0), (2, 0.05)])
def test_the_schedule_is_that_of_torch(warmup: int, final: float) -> None:
    steps, epochs, lr = 7, 5, 0.4
    schedule = LearningRateSchedule(warmup_epochs=warmup, final_lr=final)
    rates = [lr * schedule.factor(step, steps, epochs) for step in range(steps * epochs)]
    assert rates == pytest.approx(_of_torch(lr, warmup * steps, steps * epochs, final * lr), rel=1e-9)


def _of_torch(lr: float, num_warmup: int, num_steps: int, final: float) -> list[float]:
    rates: list[float] = []
    linear = {"start_factor": 1 / max(num_warmup, 1), "total_iters": max(num_warmup - 1, 1)}
    for kind, options, count in (
        (torch.optim.lr_scheduler.LinearLR, linear, num_warmup),
        (
            torch.optim.lr_scheduler.CosineAnnealingLR,
            {"T_max": num_steps - num_warmup, "eta_min": final},
            num_steps - num_warmup,
        ),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = kind(optimizer, **options)  # type: ignore[arg-type]
        for _ in range(count):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates
