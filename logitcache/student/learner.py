"""All that training changes: weights, their average, the optimiser, the scaler and the place in the data."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from logitcache.device import grad_scaler, random_states, set_random_states
from logitcache.models import Classifier
from logitcache.student.recipes import TrainingRecipe

Tensors = tuple[Tensor, ...] | list[Tensor]


class Learner:
    """A model in training; `state` and `load` carry it over a stop bit by bit."""

    def __init__(self, recipe: TrainingRecipe, classifier: Classifier, device: torch.device) -> None:
        self.device = device
        self.model = classifier.to(device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = recipe.optimizer.build(self.model)
        self.scaler = grad_scaler(device, recipe.precision)
        self._decay = recipe.ema or 0.0
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average, use_buffers=True) if recipe.ema else None
        # Kernels must depend on a batch's size alone, not on the sizes before it: a resumed run starts anywhere.
        self.forward = torch.compile(self.model, dynamic=False) if recipe.compile else self.model
        self.step = self.epoch = self.batch = 0
        self.sums = torch.zeros(2, len(recipe.losses), dtype=torch.float64, device=_sums_device(device))
        self.seconds = 0.0

    @property
    def measured(self) -> nn.Module:
        """The model to measure and to keep: the average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def add(self, terms: Tensor, rows: Tensor) -> None:
        """Add loss terms [L], each a mean over its number of rows [L], to the sums of the epoch."""
        self.sums += torch.stack([terms.detach().to(self.sums) * rows.to(self.sums), rows.to(self.sums)])

    def means(self) -> list[float]:
        """Return each loss term's mean over the rows of the epoch so far."""
        totals, rows = self.sums
        means: list[float] = (totals / rows.clamp(min=1)).tolist()
        return means

    def finite(self) -> bool:
        """Say whether every loss of the epoch so far and every weight is a number."""
        values = [self.sums, *(parameter.detach() for parameter in self.model.parameters())]
        return all(bool(value.isfinite().all()) for value in values)

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    def _average(self, averages: Tensors, currents: Tensors, num_averaged: Tensor | int) -> None:
        """Move averages towards currents; early on by more than 1 - decay, or the initial weights would stay long."""
        decay = min(self._decay, (1 + self.step) / (10 + self.step))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(currents), 1 - decay)
        else:
            torch._foreach_copy_(list(averages), list(currents))  # counters

    def state(self) -> dict[str, Any]:
        """Return everything as tensors and plain numbers."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "place": [self.step, self.epoch, self.batch],
            "sums": self.sums,
            "seconds": self.seconds,
            "random": random_states(self.device),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; its tensors are on the CPU."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batch = state["place"]
        self.sums.copy_(state["sums"])
        self.seconds = state["seconds"]
        set_random_states(self.device, state["random"])


def _sums_device(device: torch.device) -> torch.device:
    # MPS has no float64.
    return torch.device("cpu") if device.type == "mps" else device
