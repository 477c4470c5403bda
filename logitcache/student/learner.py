"""The state of training: weights, their average, the optimiser, the scaler and the position in the data."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from logitcache.logits import scaled
from logitcache.models import Classifier
from logitcache.models.taps.taps import Tapped
from logitcache.reductions import ChannelLayout
from logitcache.runtime.device import autocast, grad_scaler, random_states, seed_generators, set_random_states
from logitcache.student.distributed.ranks import ALONE, Ranks
from logitcache.student.distributed.whole_batch import WholeBatch
from logitcache.student.losses import Loss
from logitcache.student.losses.base import Context, StepSums
from logitcache.student.optim.batch_norm import synchronize
from logitcache.student.optim.schedules import Progress
from logitcache.student.speed import lay_out
from logitcache.student.training_recipes import TrainingRecipe
from logitcache.targets import Batch, Targets


class Terms(nn.Module):
    """The model with its losses, as one module: processes add up the gradients of what its `forward` uses."""

    def __init__(
        self, recipe: TrainingRecipe, model: nn.Module, adapters: nn.ModuleList, device: torch.device, ranks: Ranks
    ) -> None:
        """Take a model that gives logits, and features by tap too if the losses name taps."""
        super().__init__()
        self.model, self.adapters = model, adapters
        self._losses, self._precision, self._device = recipe.losses, recipe.precision, device
        self._has_taps = bool(recipe.taps)
        self._differentiates = any(loss.differentiates for loss in recipe.losses)
        self._whole = WholeBatch(recipe.losses, ranks)

    def forward(self, batch: Batch, progress: Progress) -> Tensor:
        """Compute each loss times its weight, [L]."""
        # Fused attention has no second derivative.
        kernels = sdpa_kernel(SDPBackend.MATH) if self._differentiates else nullcontext()
        with autocast(self._device, self._precision), kernels:
            found = self.model(batch.images)
        own = Targets(*found) if self._has_taps else Targets(found), batch
        whole = self._whole(*own)
        pairs = zip(self._losses, self.adapters, strict=True)
        terms = [
            scaled(loss(*(own if loss.by_row else whole), Context(adapter, progress)), loss.weight.at(progress))
            for loss, adapter in pairs
        ]
        return torch.stack(terms)


class Learner:
    """A model in training; `state` and `load` carry it over a stop bit by bit.

    Several ranks hold the same, but for their own random states and the sums of their own rows.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        classifier: Classifier,
        device: torch.device,
        adapters: nn.ModuleList,
        ranks: Ranks = ALONE,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> None:
        """Take up a model, an adapter for each loss, and the decided layouts of the taps; the recipe is `settled`."""
        self.device, self.ranks, self.layouts = device, ranks, layouts or {}
        self.model, self.adapters = classifier.to(device), adapters.to(device)
        if recipe.sync_batch_norm:
            synchronize(self.model, ranks)
        self.trained = nn.ModuleList([self.model, self.adapters])
        lay_out(self.model, recipe)
        self.optimizer = recipe.optimizer.build(self.trained, fused=recipe.fused is True)
        self.scaler = grad_scaler(device, recipe.precision)
        self._averaging = recipe.ema
        self.ema = recipe.ema.start(self.model) if recipe.ema is not None else None
        # After the copy for the average, or that would have the hooks too.
        tapped = Tapped(self.model, self.model.module, recipe.taps, "the model", layouts) if recipe.taps else self.model
        # Kernels must depend on a batch's size alone, not on the sizes before it: a resumed run starts anywhere.
        forward = torch.compile(tapped, dynamic=False) if recipe.compile else tapped
        assert isinstance(forward, nn.Module)
        self.terms = ranks.wrapped(Terms(recipe, forward, self.adapters, device, ranks))
        kept = [module for module in self.adapters.modules() if isinstance(module, StepSums)]
        self._step_sums = [module.get_buffer(name) for module in kept for name in module.sums]
        self.step = self.epoch = self.batch = 0
        self.sums = torch.zeros(2, len(recipe.losses), dtype=torch.float64)
        self.sums = self.sums if device.type == "mps" else self.sums.to(device)  # MPS has no float64
        self.seconds = 0.0
        if not ranks.is_first:
            seed_generators(device, ranks.own_seed(recipe.seed))

    @property
    def measured(self) -> Classifier:
        """The model to measure and to keep: the average if there is one."""
        return cast(Classifier, self.model if self.ema is None else self.ema.module)

    def share_statistics(self) -> None:
        """Broadcast the normalisation statistics of the first rank: all ranks then measure the kept model."""
        for buffer in self.measured.buffers():
            self.ranks.take_firsts(buffer)

    def add(self, terms: Tensor, rows: Tensor) -> None:
        """Add loss terms [L], each a mean over its number of rows [L], to the sums of the epoch."""
        totals, counts = self.sums
        totals += terms.detach().to(totals) * rows
        counts += rows

    def end_step(self) -> None:
        """Count the step, once the weights have moved."""
        if self._averaging is not None and self.ema is not None:
            self._averaging.update(self.ema, self.model, self.step)
        for values in self._step_sums:
            self.ranks.add_up(values)
        self.step += 1
        self.batch += 1

    def means(self) -> list[float]:
        """Return each loss term's mean over the rows of the epoch so far."""
        totals, rows = self.ranks.add_up(self.sums.clone())
        return cast(list[float], (totals / rows.clamp(min=1)).tolist())

    def in_effect(self, losses: Sequence[Loss], progress: Progress) -> dict[str, float]:
        """Return the weights and temperatures of a step, as `weight_0_kl_divergence`."""
        pairs = zip(losses, self.adapters, strict=True)
        return {
            f"{name}_{number}_{loss.kind}": value
            for number, (loss, adapter) in enumerate(pairs)
            for name, value in loss.in_effect(Context(adapter, progress)).items()
        }

    def finite(self) -> bool:
        """Return whether every loss of the epoch so far and every weight is finite."""
        values = [self.sums, *(parameter.detach() for parameter in self.trained.parameters())]
        return self.ranks.every(all(bool(value.isfinite().all()) for value in values))

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    def state(self) -> dict[str, Any]:
        """Return everything as tensors and plain numbers."""
        return {
            "model": self.model.state_dict(),
            "adapters": self.adapters.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "place": [self.step, self.epoch, self.batch],
            "seconds": self.seconds,
            "ranks": self.ranks.gathered({"sums": self.sums.cpu(), "random": random_states(self.device)}),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; its tensors are on the CPU."""
        self.model.load_state_dict(state["model"])
        self.adapters.load_state_dict(state["adapters"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batch = state["place"]
        self.seconds = state["seconds"]
        # Of another number of ranks, the first takes all sums.
        kept = state["ranks"]
        sums = [own["sums"] for own in kept]
        if len(kept) != self.ranks.size:
            sums = [torch.stack(sums).sum(dim=0), *[torch.zeros_like(sums[0])] * (self.ranks.size - 1)]
        self.sums.copy_(sums[self.ranks.rank])
        # One more rank than there were begins with draws of its own.
        for own in kept[self.ranks.rank : self.ranks.rank + 1]:
            set_random_states(self.device, own["random"])
