"""Optimisers and the learning rate as a function of the step."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, field_serializer
from torch import nn

from logitcache.config.recipe import Component, Float, Fraction, Positive
from logitcache.errors import RecipeError
from logitcache.student.optim.schedules import NonNegative, beyond

Momentum = Annotated[Float, Field(ge=0.0, lt=1.0)]


class SGD(Component):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    momentum: Momentum = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4

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
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: NonNegative = 0.05

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
    """Linear warm-up, then a cosine from the optimiser's lr down to `final_lr` times it."""

    warmup_epochs: NonNegative = 0.0
    final_lr: Fraction = 0.0

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
