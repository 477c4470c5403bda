"""What benchmarks of training share: factories as recipes name them, and the moments at which batches arrive."""

import time
from collections.abc import Callable
from typing import Any

from logitcache.student.training import Watcher
from logitcache.targets import Batch

Clock = Callable[[], float]


def custom(factory: str, **arguments: Any) -> dict[str, Any]:
    """Return the recipe entry of a factory, `file:function`."""
    return {"kind": "custom", "factory": factory, "arguments": arguments}


def seconds_between(moments: list[float]) -> float:
    """Return the time from one batch to the next, the first being left out: it warms up."""
    return (moments[-1] - moments[1]) / (len(moments) - 2)


class Arrivals(Watcher):
    """The moments at which batches arrive; a student's error ends the benchmark."""

    def __init__(self, clock: Clock = time.process_time) -> None:
        self._clock, self._moments = clock, list[float]()

    def ended_epoch(self, recipe: object, row: dict[str, Any]) -> None:
        """Show nothing."""

    def shared(self, batch: Batch, students: int, seconds: float) -> None:
        """Note a batch."""
        self._moments.append(self._clock())

    @property
    def seconds(self) -> float:
        """The time from one batch to the next."""
        return seconds_between(self._moments)
