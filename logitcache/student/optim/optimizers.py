"""Optimisers, the learning rate as a function of the step, and the moving average of a model's weights."""

import math
from typing import Annotated, Literal

import torch
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from logitcache.config.recipe import Component, Fraction, Lenient, Positive, or_a_number
from logitcache.errors import RecipeError
from logitcache.student.optim.schedules import NonNegative, beyond

Momentum = Annotated[float, Field(ge=0.0, lt=1.0), Lenient]

STATISTICS = frozenset({"running_mean", "running_var"})
"""Buffers that are averaged: statistics of batch and instance normalisation. All others are copied."""


class SGD(Component):
    """Stochastic gradient descent with momentum. Biases and normalisation do not decay."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive = Field(default=0.1, description="Largest learning rate, reached after `schedule.warmup_epochs`.")
    momentum: Momentum = Field(default=0.9, description="Factor of the velocity, below 1.")
    nesterov: bool = Field(
        default=True, description="Whether the gradient is taken after the momentum's step; needs a momentum above 0."
    )
    weight_decay: NonNegative = Field(default=5e-4, description="L2 penalty of the weights.")

    @field_serializer("nesterov")
    def _looks_ahead(self, nesterov: bool) -> bool:
        """Store whether the optimiser looks ahead: without momentum it does not, also by default."""
        return nesterov and self.momentum > 0

    def idle(self, epochs: float) -> str | None:
        """Return why the optimiser does not look ahead."""
        if "nesterov" in self.model_fields_set and self.nesterov and not self.momentum:
            return "has nesterov: true with momentum 0. Fix: nesterov: false, or raise momentum"
        return None

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser of a module's parameters."""
        return torch.optim.SGD(
            parameter_groups(module, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self._looks_ahead(self.nesterov),
        )


class AdamW(Component):
    """Adam with decoupled weight decay. Biases and normalisation do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = Field(default=1e-3, description="Largest learning rate, reached after `schedule.warmup_epochs`.")
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999), description="Decays of the running means of the gradient and of its square, both below 1."
    )
    weight_decay: NonNegative = Field(default=0.05, description="Decay of the weights, per unit of learning rate.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser of a module's parameters."""
        return torch.optim.AdamW(parameter_groups(module, self.weight_decay), lr=self.lr, betas=self.betas)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters: weights decay, biases and normalisation do not. Raises RecipeError for none."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError(
            "the model has no parameter to train. Fix: another model, or requires_grad where it is frozen"
        )
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


class LearningRateSchedule(Component):
    """Linear warm-up, then a cosine from the optimiser's `lr` down to `final_lr` times it."""

    warmup_epochs: NonNegative = Field(
        default=0.0,
        description="Epochs over which the learning rate rises from 0, fractions too; at most those of the run.",
    )
    final_lr: Fraction = Field(
        default=0.0,
        description="Learning rate at the end of the run, as a fraction of the optimiser's `lr`; 1 keeps it constant.",
    )

    def idle(self, epochs: float) -> str | None:
        """Return why the optimiser's rate is never reached."""
        return beyond("warms up", "warmup_epochs", self.warmup_epochs, epochs)

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Return lr at a step over the optimiser's lr: a function of the step alone, so that a resumed run agrees."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps_per_epoch * epochs - warmup)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind")]


class EMA(Component):
    """Exponential moving average after every step: e ← d · e + (1 - d) · w; after the first step e = w.

    Parameters and statistics of normalisation are averaged. Other buffers are copied from the model: singular vectors
    of spectral normalisation, codebooks and counters belong to one state of the model, and their mean to none. d is
    `decay`, or with `warmup` min(decay, (1 + t) / (10 + t)) at step t, from 0: the update is
    torch.optim.swa_utils.get_ema_multi_avg_fn, the warm-up that of TensorFlow's ExponentialMovingAverage.
    """

    model_config = ConfigDict(json_schema_extra=or_a_number)

    decay: Annotated[float, Field(gt=0.0, lt=1.0), Lenient] = Field(
        description="Largest weight d of the average so far, below 1; the number alone is short for this entry.",
        examples=[0.999],
    )
    warmup: bool = Field(
        default=True,
        description="Whether d is min(`decay`, (1 + t) / (10 + t)) at step t, from 0, so that early weights are "
        "forgotten soon.",
    )

    @model_serializer(mode="wrap")
    def _as_a_number(self, fields: SerializerFunctionWrapHandler) -> object:
        """Store an average with warm-up as its decay alone."""
        return self.decay if self.warmup else fields(self)

    def decay_at(self, step: int) -> float:
        """Return d at a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def start(self, model: nn.Module) -> AveragedModel:
        """Copy a model, to average it from then on."""
        return AveragedModel(model, use_buffers=True)

    def update(self, average: AveragedModel, model: nn.Module, step: int) -> None:
        """Move the average towards the model, after a step of it."""
        average.multi_avg_fn = get_ema_multi_avg_fn(self.decay_at(step))  # type: ignore[no-untyped-call]
        average.update_parameters(model)
        pairs = zip(average.module.named_buffers(), model.buffers(), strict=True)
        with torch.no_grad():
            for (name, averaged), current in pairs:
                if name.rpartition(".")[2] not in STATISTICS:
                    averaged.copy_(current)


def _as_decay(value: object) -> object:
    """Read a number as the decay."""
    return value if value is None or isinstance(value, dict | EMA) else {"decay": value}


Average = Annotated[EMA, BeforeValidator(_as_decay)]
"""An EMA, or its decay alone."""
