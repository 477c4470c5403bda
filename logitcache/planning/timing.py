"""What work in batches takes: clocks that are read as it goes on, and what a row takes once it goes on steadily."""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from logitcache.runtime.device import synchronize
from logitcache.teacher.teacher import Teacher


def by_row(marks: Sequence[Sequence[float]], num_workers: int) -> list[float]:
    """Return what each row adds to sums that were noted after batches, at least two, the first of them of rows.

    Left out are the first batches, which find everything cold; of the others medians are taken, as others may use the
    machine meanwhile.
    """
    warm = min(1 + 2 * num_workers, (len(marks) - 1) // 2)
    # Batches come in turns from the processes that render: as many are looked at together.
    together = max(1, min(num_workers, (len(marks) - 1 - warm) // 2))
    pairs = [(marks[at], marks[at + together]) for at in range(warm, len(marks) - together, together)]
    spans = [[(b - a) / (two[0] - one[0]) for a, b in zip(one, two, strict=True)] for one, two in pairs]
    return [statistics.median(values) for values in zip(*spans, strict=True)]


class Answered:
    """The seconds that it took all teachers to answer; after each batch of a teacher, its rows and the time."""

    def __init__(self) -> None:
        self.batches: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self.seconds = 0.0
        self._began = 0.0

    def begin(self, inputs: tuple[Tensor, Tensor]) -> None:
        """Note when an answer begins."""
        synchronize(inputs[0].device)
        self._began = time.perf_counter()

    def end(self, name: str, inputs: tuple[Tensor, Tensor]) -> None:
        """Note when it ends."""
        synchronize(inputs[0].device)
        now = time.perf_counter()
        self.seconds += now - self._began
        rows = self.batches[name][-1][0] if self.batches[name] else 0
        self.batches[name].append((rows + len(inputs[0]), now))


@contextlib.contextmanager
def answered(teachers: Sequence[Teacher]) -> Iterator[Answered]:
    """Count what teachers answer within the block."""
    found = Answered()
    with contextlib.ExitStack() as hooks:
        for teacher in teachers:
            before, after = _hooks(found, teacher.name)
            hooks.callback(teacher.register_forward_pre_hook(before).remove)
            hooks.callback(teacher.register_forward_hook(after).remove)
        yield found


def _hooks(found: Answered, name: str) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
    return lambda teacher, inputs: found.begin(inputs), lambda teacher, inputs, answers: found.end(name, inputs)
