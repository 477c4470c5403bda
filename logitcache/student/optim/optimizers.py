"""Optimisers and the learning rate as a function of the step."""

import math
from typing import Annotated, Literal

import torch
from pydantic import (
    Field,
    field_serializer,
)
from torch import nn

from logitcache.config.recipe import Component, Fraction, Lenient, Positive
from logitcache.errors import RecipeError
from logitcache.student.optim.schedules import NonNegative, beyond

Fused = Annotated[
    Literal["auto"] | bool,
    Field(
        description="Whether the optimiser uses PyTorch's fused implementation, which rounds differently. `auto`: on a "
        "CPU and on CUDA; the run records the choice. Runs of versions before this key resume without it.",
    ),
]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0), Lenient]


class SGD(Component):
    """Stochastic gradient descent with momentum. Biases and normalisation parameters do not decay."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive = Field(default=0.1, description="Peak learning rate, reached after `schedule.warmup_epochs`.")
    momentum: Momentum = Field(default=0.9, description="Momentum, below 1.")
    nesterov: bool = Field(default=True, description="Whether to use Nesterov momentum; needs a momentum above 0.")
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

    def build(self, module: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        """Build the optimiser of a module's parameters; `fused`: its step is one kernel."""
        return torch.optim.SGD(
            parameter_groups(module, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self._looks_ahead(self.nesterov),
            fused=fused or None,  # False would also leave out the kernels for lists of tensors
        )


class AdamW(Component):
    """Adam with decoupled weight decay. Biases and normalisation parameters do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = Field(default=1e-3, description="Peak learning rate, reached after `schedule.warmup_epochs`.")
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999),
        description="Decay rates of the running means of the gradient and of its square, both below 1.",
    )
    weight_decay: NonNegative = Field(
        default=0.05, description="Decoupled weight decay, multiplied by the learning rate."
    )

    def build(self, module: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
        """Build the optimiser of a module's parameters; `fused`: its step is one kernel."""
        groups = parameter_groups(module, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused or None)


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
    """Linear warm-up, then cosine decay from the optimiser's `lr` to `final_lr` times `lr`."""

    warmup_epochs: NonNegative = Field(
        default=0.0,
        description="Epochs over which the learning rate rises from 0, fractions allowed; at most those of the run.",
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
