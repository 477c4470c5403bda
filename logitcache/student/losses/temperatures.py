"""Temperatures of a loss: schedules, one that follows the student, and one for each row."""

from abc import ABC
from typing import Annotated, ClassVar, Literal, Protocol, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, model_validator
from torch import Tensor, nn

from logitcache.config.recipe import Positive
from logitcache.logits import Logits, log_probs
from logitcache.student.losses.base import Context, LossBase, Need, Site, StepSums, known_labels, targets_of
from logitcache.student.losses.cross_entropy import CrossEntropy, cross_entropy
from logitcache.student.optim.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    NonNegative,
    TemperatureBase,
    WarmUp,
    as_schedule,
)
from logitcache.targets import Batch, Targets


class Thermostat(StepSums):
    """A temperature, and by how much the student lagged the teacher in the last step: Σ of the gap, and its rows."""

    sums: ClassVar[tuple[str, ...]] = ("gap", "rows")

    temperature: Tensor
    gap: Tensor
    rows: Tensor
    step: Tensor

    def __init__(self, start: float) -> None:
        """Begin at a temperature, before the first step."""
        super().__init__()
        for name, value in {"temperature": start, "gap": 0.0, "rows": 0.0, "step": -1}.items():
            self.register_buffer(name, torch.tensor(value))


class Dynamic(TemperatureBase):
    """Increase by `step` while the student lags the teacher by more than `margin`, and decrease while the student
    leads.

    The gap is the student's cross-entropy with the labels minus the teacher's, at T = 1, over the labelled rows of the
    previous step, so that the micro-batches of a step share one temperature. The first step has `start`; T stays within
    [min, max], and does not change if no row has a label. The rule is ours; Islam et al., "Dynamic temperature
    scheduler for knowledge distillation" (2025), use the same gap.
    """

    needs: ClassVar[frozenset[Literal["labels"]]] = frozenset({"labels"})

    kind: Literal["dynamic"] = "dynamic"
    start: Positive = Field(description="Temperature of the first step.", examples=[4])
    step: Positive = Field(description="Change of the temperature in each step.", examples=[0.01])
    margin: NonNegative = Field(
        default=0.0, description="Gap of the cross-entropies, in nats, above which the student lags."
    )
    min: Positive = Field(description="Smallest temperature.", examples=[1])
    max: Positive = Field(description="Largest temperature.", examples=[8])

    @model_validator(mode="after")
    def _start_within(self) -> Self:
        if not self.min <= self.start <= self.max:
            raise ValueError(f"start ({self.start:g}) must be from min ({self.min:g}) to max ({self.max:g})")
        return self

    def idle(self, epochs: float) -> str | None:
        """Return why the temperature never moves."""
        return f"has min equal to max. Fix: the number {self.min:g}" if self.min == self.max else None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return self.min, self.max

    def memory(self) -> nn.Module:
        """Build what is remembered from step to step."""
        return Thermostat(self.start)

    def in_effect(self, context: Context) -> float:
        """Return the temperature of the last step."""
        assert isinstance(context.adapter, Thermostat)
        return float(context.adapter.temperature)

    @torch.no_grad()
    def now(self, student: Tensor, teacher: Logits, batch: Batch, context: Context) -> Tensor:
        """Return the temperature of the step, a scalar; in training, note how far the student lags."""
        memory = context.adapter
        assert isinstance(memory, Thermostat)
        if memory.training:
            rows = CrossEntropy().rows(batch)
            behind = cross_entropy(student, batch.labels, mixed=batch.mixed)
            behind = behind - cross_entropy(log_probs(teacher), batch.labels, mixed=batch.mixed)
            self._note(memory, behind * rows, rows, context.progress.step)
        # A backward pass may still need the value when the next step changes the buffer.
        return memory.temperature.clone()

    def _note(self, memory: Thermostat, gap: Tensor, rows: Tensor, step: int) -> None:
        """Move the temperature at the first part of a step, and add up the gap of all; never waits for the device."""
        is_first = memory.step != step
        mean = memory.gap / memory.rows.clamp(min=1)
        change = self.step * ((mean > self.margin).float() - (mean < 0).float())
        memory.temperature.add_(change * is_first).clamp_(self.min, self.max)
        for total, part in ((memory.gap, gap), (memory.rows, rows)):
            total.copy_(torch.where(is_first, part, total + part))
        memory.step.fill_(step)


class ConfidenceTemperature(TemperatureBase):
    """A temperature for each row: `low` + (`high` - `low`) · p_max, the teacher's largest probability at T = 1.

    With `high` above `low`, rows on which the teacher is confident are softened more. The rule is ours, as it needs
    only the teacher's distribution; Wei and Bai, "Dynamic temperature knowledge distillation" (2024), use the sharpness
    of both models' logits.
    """

    kind: Literal["by_confidence"] = "by_confidence"
    low: Positive = Field(
        description="Temperature of a row in the limit of a largest probability of 0: the teacher is uncertain.",
        examples=[2],
    )
    high: Positive = Field(
        description="Temperature of a row whose largest probability is 1: the teacher is certain.", examples=[6]
    )

    def idle(self, epochs: float) -> str | None:
        """Return why all rows have one temperature."""
        return f"has low equal to high. Fix: the number {self.low:g}" if self.low == self.high else None

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return min(self.low, self.high), max(self.low, self.high)

    @torch.no_grad()
    def now(self, student: Tensor, teacher: Logits, batch: Batch, context: Context) -> Tensor:
        """Return the temperature of each row, [B]."""
        return self.low + (self.high - self.low) * log_probs(teacher).amax(dim=1).exp()


class Tempered(Protocol):
    """What names a teacher and a temperature."""

    @property
    def temperature(self) -> TemperatureBase: ...
    @property
    def teacher(self) -> str | None: ...


class TemperedLoss(LossBase, ABC):
    """A loss on logits with the fields of `Tempered`."""

    def compared(
        self: Tempered, outputs: Targets, batch: Batch, context: Context
    ) -> tuple[Tensor, Targets, float | Tensor]:
        """Return the student's logits [B, C], the teacher's answers, and the temperature."""
        teacher = targets_of(batch.teachers, self.teacher)
        return outputs.logits, teacher, self.temperature.now(outputs.logits, teacher, batch, context)

    def adapter(self: Tempered, site: Site) -> nn.Module:
        """Build what the temperature remembers."""
        return self.temperature.memory()


class SingleLabelLoss(TemperedLoss, ABC):
    """A loss on logits that is a mean over the rows with a label, of one class each."""

    asks: ClassVar[frozenset[Need]] = frozenset({"single labels", "logits"})
    exclusive: ClassVar[bool] = True

    def rows(self, batch: Batch) -> Tensor:
        """Count the rows that have a label."""
        return known_labels(batch.labels).sum()


def _always_positive(temperature: TemperatureBase) -> TemperatureBase:
    if temperature.bounds[0] <= 0:
        raise ValueError("must be greater than 0 at all times")
    return temperature


Temperature = Annotated[
    Constant | Linear | Cosine | Exponential | WarmUp | Dynamic,
    Discriminator("kind"),
    BeforeValidator(as_schedule),
    AfterValidator(_always_positive),
]

RowTemperature = Annotated[
    Constant | Linear | Cosine | Exponential | WarmUp | Dynamic | ConfidenceTemperature,
    Discriminator("kind"),
    BeforeValidator(as_schedule),
    AfterValidator(_always_positive),
]
