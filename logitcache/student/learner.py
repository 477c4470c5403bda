"""All that training changes: weights, their average, the optimiser, the scaler and the place in the data."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from logitcache.device import grad_scaler
from logitcache.models import Classifier
from logitcache.student.recipes import TrainingRecipe


class Learner:
    """A model in training; `state` and `load` carry it over a stop bit by bit."""

    def __init__(self, recipe: TrainingRecipe, classifier: Classifier, num_terms: int, device: torch.device) -> None:
        self.device = device
        self.model = classifier.to(device)
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = recipe.optimizer.build(self.model)
        self.scaler = grad_scaler(device, recipe.precision)
        self.ema = None if recipe.ema is None else _average(self.model, recipe.ema)
        self.forward = torch.compile(self.model) if recipe.compile else self.model
        self.step = self.epoch = self.batch = 0
        self.sums = torch.zeros(num_terms + 1, dtype=torch.float64, device=_sums_device(device))
        self.seconds = 0.0

    @property
    def measured(self) -> nn.Module:
        """The model to measure and to keep: the average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def add(self, terms: Tensor, count: int) -> None:
        """Add a batch's loss terms, weighted by its images, to the sums of the epoch."""
        values = torch.cat([terms.detach().to(self.sums), self.sums.new_ones(1)])
        self.sums += values * count

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
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batch = state["place"]
        self.sums, self.seconds = state["sums"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)


def _average(model: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _sums_device(device: torch.device) -> torch.device:
    # MPS has no float64.
    return torch.device("cpu") if device.type == "mps" else device
