"""Schedules: numbers of a recipe that change in the course of a run, as pure functions of its progress."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, model_serializer
from torch import Tensor, nn

from logitcache.config.recipe import Component, Float, Lenient, Positive, or_a_number
from logitcache.logits import Logits
from logitcache.targets import Batch

NonNegative = Annotated[float, Field(ge=0.0), Lenient]
Rate = Annotated[float, Field(gt=0.0, le=1.0), Lenient]


@dataclass(frozen=True)
class Progress:
    """A step of training, counted from 0 over all epochs, in a run of so many epochs of so many steps."""

    step: int
    steps_per_epoch: int
    num_epochs: int

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.step / max(1, self.steps_per_epoch)


@dataclass(frozen=True)
class Context:
    """What a loss gets beside outputs and batch: its own adapter, and the progress of training."""

    adapter: nn.Module
    progress: Progress


class TemperatureBase(Component, ABC):
    """A temperature that softens logits: of the whole batch, or row by row."""

    needs: ClassVar[frozenset[Literal["labels"]]] = frozenset()

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value at any time; a limit that is only approached counts."""

    @abstractmethod
    def now(self, student: Tensor, teacher: Logits, batch: Batch, context: Context) -> float | Tensor:
        """Return the temperature of a batch: a number, a scalar, or one for each row, float32 [B].

        `student`: logits [B, C]; `teacher`: logits [B, C] or an encoded form.
        """

    def in_effect(self, context: Context) -> float | None:
        """Return the value of a step, for the metrics; None if each row has its own."""
        return None

    def memory(self) -> nn.Module:
        """Build what is remembered from step to step; it becomes the adapter of the loss."""
        return nn.Identity()


class Schedule(TemperatureBase):
    """A number that depends on the epoch and its fraction alone: a resumed run needs no state for it."""

    @abstractmethod
    def at(self, progress: Progress) -> float:
        """Return the value at a step."""

    def now(self, student: Tensor, teacher: Logits, batch: Batch, context: Context) -> float | Tensor:
        """Return the value at the step, whatever the batch."""
        return self.at(context.progress)

    def in_effect(self, context: Context) -> float:
        """Return the value at the step."""
        return self.at(context.progress)


class Constant(Schedule):
    """A constant, which is also written as a plain number."""

    model_config = ConfigDict(json_schema_extra=or_a_number)

    kind: Literal["constant"] = "constant"
    value: Float = Field(description="The number.")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return self.value, self.value

    def at(self, progress: Progress) -> float:
        """Return the value."""
        return self.value

    @model_serializer
    def _as_a_number(self) -> float:
        return self.value


class _Between(Schedule, ABC):
    """From `start` to `stop` over `epochs`, by default those of the run; `stop` from then on."""

    kind: str
    start: Float = Field(description="Value at the start of the run.", examples=[8])
    stop: Float = Field(description="Value after `epochs`.", examples=[1])
    epochs: Positive | None = Field(
        default=None,
        description="Epochs from `start` to `stop`, fractions allowed; by default, and at most, those of the run.",
        examples=[10],
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return min(self.start, self.stop), max(self.start, self.stop)

    def idle(self, epochs: float) -> str | None:
        """Return why nothing changes, or why `stop` is never reached."""
        if self.start == self.stop:
            return f"starts where it stops. Fix: the number {self.start:g}"
        return None if self.epochs is None else beyond("goes on", "epochs", self.epochs, epochs)


class Linear(_Between):
    """Linear from `start` to `stop` over `epochs`, by default those of the run; then `stop`."""

    kind: Literal["linear"] = "linear"

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        done = _share(progress, self.epochs)
        return (1 - done) * self.start + done * self.stop


class Cosine(_Between):
    """From `start` to `stop` along half a cosine over `epochs`, by default those of the run; then `stop`."""

    kind: Literal["cosine"] = "cosine"

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        left = (1 + math.cos(math.pi * _share(progress, self.epochs))) / 2
        return left * self.start + (1 - left) * self.stop


class Exponential(Schedule):
    """`start` · `decay`^epoch, and never below `floor`."""

    kind: Literal["exponential"] = "exponential"
    start: Positive = Field(description="Value at the start of the run.", examples=[8])
    decay: Rate = Field(description="Factor by which the value changes in each epoch, at most 1.", examples=[0.9])
    floor: NonNegative = Field(default=0.0, description="Smallest value.")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value; without a floor the lowest is above 0 for ever."""
        return self.floor or math.ulp(0.0), max(self.start, self.floor)

    def idle(self, epochs: float) -> str | None:
        """Return why nothing changes."""
        if self.decay == 1 or self.floor >= self.start:
            return f"never falls. Fix: a smaller decay or floor, or the number {self.bounds[1]:g}"
        return None

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        return max(self.bounds[0], self.start * math.pow(self.decay, progress.epoch))


class WarmUp(Schedule):
    """Linear from 0 to `value` over `epochs`; then `value`."""

    kind: Literal["warm_up"] = "warm_up"
    value: Float = Field(description="Value after `epochs`.", examples=[1])
    epochs: Positive = Field(
        description="Epochs of the rise from 0, fractions allowed; at most those of the run.", examples=[20]
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return min(0.0, self.value), max(0.0, self.value)

    def idle(self, epochs: float) -> str | None:
        """Return why the value is never reached."""
        return beyond("warms up", "epochs", self.epochs, epochs)

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        return _share(progress, self.epochs) * self.value


def _share(progress: Progress, epochs: float | None) -> float:
    """Return the share of so many epochs that is done, at most 1."""
    return min(1.0, progress.epoch / (epochs or progress.num_epochs))


def beyond(verb: str, key: str, given: float, epochs: float) -> str | None:
    """Return what is wrong with more epochs than the run has; None for at most as many."""
    if given <= epochs:
        return None
    return f"{verb} beyond the run: {key} is {given:g}, the run has {epochs:g} epochs. Fix: {key}: {epochs:g} at most"


def constant(value: float) -> Constant:
    """Return a number that stays."""
    return Constant(value=value)


def as_schedule(value: object) -> object:
    """Read a number, also '3e-4' in quotes, as one that stays; a mapping is left for the validation to judge."""
    if isinstance(value, dict | Component):
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a number, or a schedule such as {kind: linear, start: 8, stop: 1, epochs: 10}")
    return constant(number)


def _never_negative(schedule: Schedule) -> Schedule:
    if schedule.bounds[0] < 0:
        raise ValueError("must be 0 or more at all times")
    return schedule


Weight = Annotated[
    Constant | Linear | Cosine | Exponential | WarmUp,
    Discriminator("kind"),
    BeforeValidator(as_schedule),
    AfterValidator(_never_negative),
]
