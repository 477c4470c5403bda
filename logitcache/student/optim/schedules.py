"""Numbers of a recipe that may change in the course of a run, as pure functions of where training stands."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, model_serializer
from torch import Tensor, nn

from logitcache.config.recipe import Component, Float, Positive
from logitcache.logits import Logits
from logitcache.student.optim.progress import Progress
from logitcache.targets import Batch

NonNegative = Annotated[Float, Field(ge=0.0)]
Rate = Annotated[Float, Field(gt=0.0, le=1.0)]


class Moment(Protocol):
    """Where training stands, and the module in which a temperature keeps what it remembers."""

    @property
    def adapter(self) -> nn.Module: ...
    @property
    def progress(self) -> Progress: ...


class TemperatureBase(Component, ABC):
    """How much logits are softened: for the whole batch, or row by row."""

    needs: ClassVar[frozenset[Literal["labels"]]] = frozenset()

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The smallest value at any time; a bound where it is only approached."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The largest value at any time."""

    @abstractmethod
    def now(self, student: Tensor, teacher: Logits, batch: Batch, moment: Moment) -> float | Tensor:
        """Return the temperature of a batch: a number, a scalar, or one for each row, float32 [B].

        `student`: logits [B, C]; `teacher`: logits [B, C] or an encoded form.
        """

    def in_effect(self, moment: Moment) -> float | None:
        """Return the value of a step, for the metrics; None if each row has its own."""
        return None

    def memory(self) -> nn.Module:
        """Build what is remembered from step to step; it becomes the adapter of the loss."""
        return nn.Identity()


class Schedule(TemperatureBase):
    """A number that depends on the epoch alone, with its fraction: a run that continues needs no state for it."""

    @abstractmethod
    def at(self, progress: Progress) -> float:
        """Return the value at a step."""

    def now(self, student: Tensor, teacher: Logits, batch: Batch, moment: Moment) -> float | Tensor:
        """Return the value at the step, whatever the batch."""
        return self.at(moment.progress)

    def in_effect(self, moment: Moment) -> float:
        """Return the value at the step."""
        return self.at(moment.progress)


class Constant(Schedule):
    """What a plain number means, and its stored form is that number."""

    kind: Literal["constant"] = "constant"
    value: Float

    @property
    def lowest(self) -> float:
        """The smallest value at any time."""
        return self.value

    @property
    def highest(self) -> float:
        """The largest value at any time."""
        return self.value

    def at(self, progress: Progress) -> float:
        """Return the value."""
        return self.value

    @model_serializer
    def _as_a_number(self) -> float:
        return self.value


class Linear(Schedule):
    """From `start` to `stop` in equal steps over `epochs`, by default those of the run; `stop` from then on."""

    kind: Literal["linear"] = "linear"
    start: Float
    stop: Float
    epochs: Positive | None = None

    @property
    def lowest(self) -> float:
        """The smallest value at any time."""
        return min(self.start, self.stop)

    @property
    def highest(self) -> float:
        """The largest value at any time."""
        return max(self.start, self.stop)

    def idle(self, epochs: float) -> str | None:
        """Return why nothing changes, or why `stop` is never reached."""
        return _no_way(self.start, self.stop, self.epochs, epochs)

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        done = _share(progress, self.epochs)
        return (1 - done) * self.start + done * self.stop


class Cosine(Schedule):
    """From `start` to `stop` along half a cosine over `epochs`, by default those of the run; `stop` from then on."""

    kind: Literal["cosine"] = "cosine"
    start: Float
    stop: Float
    epochs: Positive | None = None

    @property
    def lowest(self) -> float:
        """The smallest value at any time."""
        return min(self.start, self.stop)

    @property
    def highest(self) -> float:
        """The largest value at any time."""
        return max(self.start, self.stop)

    def idle(self, epochs: float) -> str | None:
        """Return why nothing changes, or why `stop` is never reached."""
        return _no_way(self.start, self.stop, self.epochs, epochs)

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        left = (1 + math.cos(math.pi * _share(progress, self.epochs))) / 2
        return left * self.start + (1 - left) * self.stop


class Exponential(Schedule):
    """`start` · `decay`^epoch, and never below `floor`."""

    kind: Literal["exponential"] = "exponential"
    start: Positive
    decay: Rate
    floor: NonNegative = 0.0

    @property
    def lowest(self) -> float:
        """The smallest value at any time, which without a floor is above 0 for ever."""
        return self.floor or math.ulp(0.0)

    @property
    def highest(self) -> float:
        """The largest value at any time."""
        return max(self.start, self.floor)

    def idle(self, epochs: float) -> str | None:
        """Return why nothing changes."""
        if self.decay == 1 or self.floor >= self.start:
            return f"never falls. Fix: a smaller decay or floor, or the number {self.highest:g}"
        return None

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        return max(self.lowest, self.start * math.pow(self.decay, progress.epoch))


class WarmUp(Schedule):
    """From 0 in equal steps over `epochs` to `value`, which then stays."""

    kind: Literal["warm_up"] = "warm_up"
    value: Float
    epochs: Positive

    @property
    def lowest(self) -> float:
        """The smallest value at any time."""
        return min(0.0, self.value)

    @property
    def highest(self) -> float:
        """The largest value at any time."""
        return max(0.0, self.value)

    def idle(self, epochs: float) -> str | None:
        """Return why the value is never reached."""
        return beyond("warms up", "epochs", self.epochs, epochs)

    def at(self, progress: Progress) -> float:
        """Return the value at a step."""
        return _share(progress, self.epochs) * self.value


def _share(progress: Progress, epochs: float | None) -> float:
    """Return the share of so many epochs that is done, at most 1."""
    return min(1.0, progress.epoch / (epochs or progress.num_epochs))


def _no_way(start: float, stop: float, given: float | None, epochs: float) -> str | None:
    """Return what is wrong with a way from `start` to `stop` in so many epochs; None if it ends within the run."""
    if start == stop:
        return f"starts where it stops. Fix: the number {start:g}"
    return None if given is None else beyond("goes on", "epochs", given, epochs)


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
    if schedule.lowest < 0:
        raise ValueError("must be 0 or more at all times")
    return schedule


Weight = Annotated[
    Constant | Linear | Cosine | Exponential | WarmUp,
    Discriminator("kind"),
    BeforeValidator(as_schedule),
    AfterValidator(_never_negative),
]
