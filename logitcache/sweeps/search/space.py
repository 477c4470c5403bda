"""Ranges of a search's space: the numbers that a key of the student's recipe may take."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from logitcache.config.recipe import Component, Count, Float, Positive


class Uniform(Component):
    """Numbers from `low` to `high`, uniform."""

    kind: Literal["uniform"] = "uniform"
    low: Float = Field(description="Smallest number.", examples=[0.1])
    high: Float = Field(description="Largest number.", examples=[0.9])

    def at(self, share: float) -> float:
        """Return the number below which a share of the range lies."""
        return min(self.low + share * (self.high - self.low), self.high)


class LogUniform(Component):
    """Numbers from `low` to `high`, uniform in their logarithm."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: Positive = Field(description="Smallest number.", examples=[1e-4])
    high: Positive = Field(description="Largest number.", examples=[0.1])

    def at(self, share: float) -> float:
        """Return the number below which a share of the range lies."""
        return min(self.low * math.exp(share * math.log(self.high / self.low)), self.high)


class Integer(Component):
    """Whole numbers from `low` to `high` in equal steps, all equally likely."""

    kind: Literal["integer"] = "integer"
    low: int = Field(description="Smallest number.", examples=[4])
    high: int = Field(description="Largest number; the last step may end before it.", examples=[32])
    step: Count = Field(default=1, description="Difference between neighbouring numbers.")

    def at(self, share: float) -> int:
        """Return the number below which a share of the range lies."""
        count = (self.high - self.low) // self.step + 1
        return self.low + self.step * min(int(share * count), count - 1)


def _ascending(found: Uniform | LogUniform | Integer) -> Uniform | LogUniform | Integer:
    if found.low >= found.high:
        raise ValueError(f"low {found.low} is not less than high {found.high}")
    return found


Range = Annotated[Uniform | LogUniform | Integer, Field(discriminator="kind"), AfterValidator(_ascending)]
RANGES = tuple(str(one.model_fields["kind"].default) for one in (Uniform, LogUniform, Integer))
Choices = Annotated[list[JsonValue], Field(min_length=1)] | Annotated[dict[str, JsonValue], Field(min_length=1)]
Space = Annotated[dict[str, Range | Choices], Field(min_length=1)]
