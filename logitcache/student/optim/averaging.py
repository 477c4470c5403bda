"""The moving average of a model's weights, which is measured and kept in the place of the model."""

from typing import Annotated

import torch
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from logitcache.config.recipe import Component, Lenient, or_a_number

STATISTICS = frozenset({"running_mean", "running_var"})
"""Buffers that are averaged: statistics of batch and instance normalisation. All others are copied."""


class EMA(Component):
    """Exponential moving average after every step: e ← d · e + (1 - d) · w; after the first step e = w.

    Parameters and running statistics of normalisation layers are averaged. Other buffers, such as singular vectors of
    spectral normalisation, codebooks and counters, are copied from the model, as their mean would match no state of it.
    d is `decay`, or with `warmup` min(decay, (1 + t) / (10 + t)) at step t, from 0: the update is
    torch.optim.swa_utils.get_ema_multi_avg_fn, the warm-up that of TensorFlow's ExponentialMovingAverage.
    """

    model_config = ConfigDict(json_schema_extra=or_a_number)

    decay: Annotated[float, Field(gt=0.0, lt=1.0), Lenient] = Field(
        description="Largest weight d of the average so far, below 1. The number alone is short for this entry.",
        examples=[0.999],
    )
    warmup: bool = Field(
        default=True,
        description="Whether d is min(`decay`, (1 + t) / (10 + t)) at step t, from 0, so that early weights decay "
        "quickly.",
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
