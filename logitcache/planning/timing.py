"""Measure steady-state seconds by row, and the time that teachers take to answer."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.runtime.device import synchronize
from logitcache.teacher.teacher import Teacher

Quartiles = NDArray[np.float64]
"""[3]: lower quartile, median and upper quartile of a measurement, as others may use the machine meanwhile."""


def by_row(marks: Sequence[Sequence[float]], num_workers: int) -> list[Quartiles]:
    """Return the quartiles of what each row adds to sums that were noted after batches, the first sum being the rows.

    At least two batches were noted; the first ones, which find everything cold, are left out.
    """
    warm = min(1 + 2 * num_workers, (len(marks) - 1) // 2)
    # Batches come in turns from the processes that render: as many are taken together.
    together = max(1, min(num_workers, (len(marks) - 1 - warm) // 2))
    sums = np.array(marks)[warm::together]
    steps = np.diff(sums, axis=0)
    return list(np.quantile(steps / steps[:, :1], (0.25, 0.5, 0.75), axis=0).T)


class AnswerTimes:
    """The seconds in which all teachers answered; by teacher, the rows and the time after each batch that has keys.

    Trials of a teacher have none.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.batches: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)


@contextlib.contextmanager
def timed_answers(teachers: Sequence[Teacher]) -> Iterator[AnswerTimes]:
    """Time the answers of teachers within the block, each with its device's queue empty before and after."""
    times, began = AnswerTimes(), 0.0

    def before(teacher: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal began
        synchronize(inputs[0].device)
        began = time.perf_counter()

    def after(teacher: Any, inputs: tuple[Any, ...], answers: Any) -> None:
        synchronize(inputs[0].device)
        now, batches = time.perf_counter(), times.batches[teacher.name]
        times.seconds += now - began
        if any(map(len, inputs[2:])):
            batches.append(((batches[-1][0] if batches else 0) + len(inputs[0]), now))

    with contextlib.ExitStack() as hooks:
        for teacher in teachers:
            hooks.callback(teacher.register_forward_pre_hook(before).remove)
            hooks.callback(teacher.register_forward_hook(after).remove)
        yield times
