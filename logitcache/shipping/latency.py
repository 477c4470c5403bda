"""Time an exported file in turns with what it was made from."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, get_num_threads

from logitcache.student.evaluation.cost import LatencyPlan, time_in_turns

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FileLatency:
    """The median seconds of a batch on the CPU: of the reference, and of the file; `speed_up` is their ratio.

    The reference is eager torch for an export, and the float file for one that was quantised after training.
    """

    batch_size: int
    threads: int
    reference_seconds: float
    file_seconds: float
    speed_up: float


def file_latencies(
    reference: Callable[[int], Predict], file: Callable[[int], Predict], image: Tensor, plan: LatencyPlan
) -> Iterator[FileLatency]:
    """Time what two functions return for a number of threads, on batches of an image [C, h, w]."""
    for threads, count in itertools.product(plan.threads or (get_num_threads(),), plan.batch_sizes):
        pixels = image.expand(count, *image.shape).contiguous()
        calls = [partial(make(threads), pixels) for make in (reference, file)]
        own, taken = time_in_turns(calls, threads, plan.warm_up, plan.repeats)
        yield FileLatency(count, threads, own, taken, own / taken)
