"""Time two models in turns: what slows the machine for a while slows both."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, get_num_threads, inference_mode

from logitcache.student.evaluation.cost import LatencyPlan, limited_threads

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Turns:
    """The median seconds of a batch of two models on the CPU, by turns; `speed_up` is the first over the second."""

    batch_size: int
    threads: int
    first_seconds: float
    second_seconds: float
    speed_up: float


def time_in_turns(
    first: Callable[[int], Predict], second: Callable[[int], Predict], image: Tensor, plan: LatencyPlan
) -> Iterator[Turns]:
    """Time what two functions return for a number of threads, on batches of an image [C, h, w].

    The order changes each round.
    """
    for threads, count in itertools.product(plan.threads or (get_num_threads(),), plan.batch_sizes):
        pixels = image.expand(count, *image.shape).contiguous()
        times: tuple[list[float], list[float]] = ([], [])
        with limited_threads(threads), inference_mode():
            pairs = list(zip((first(threads), second(threads)), times, strict=True))
            for number in range(plan.warm_up + plan.repeats):
                for predict, taken in pairs[:: 1 if number % 2 else -1]:
                    started = time.perf_counter()
                    predict(pixels)
                    taken.append(time.perf_counter() - started)
        one, other = (max(statistics.median(taken[plan.warm_up :]), 1e-9) for taken in times)
        yield Turns(count, threads, one, other, one / other)
