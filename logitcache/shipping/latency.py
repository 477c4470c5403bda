"""Time an exported file in turns with what it was made from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from logitcache.runtime.console import logger
from logitcache.student.evaluation.cost import LatencyPlan, time_in_turns

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FileLatency:
    """The median seconds of a batch on the CPU: of the reference, and of the file; `speed_up` is their ratio.

    The reference is eager torch for an export in float, and a float file for one in int8.
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
    for threads, pixels in plan.batches(image):
        calls = [partial(make(threads), pixels) for make in (reference, file)]
        own, taken = time_in_turns(calls, threads, plan.warm_up, plan.repeats)
        yield FileLatency(len(pixels), threads, own, taken, own / taken)


def warn_if_slow(file: str, float_layers: int, latencies: Sequence[FileLatency]) -> None:
    """Warn of layers of an int8 file that onnxruntime computes in float, and of times not better than in float."""
    if float_layers:
        logger.warning(f"{file}: onnxruntime computes {float_layers} layers with weights in float, not on integers")
    for row in latencies:
        if row.speed_up <= 1:
            logger.warning(
                f"{file}: int8 is not faster on this machine, {row.speed_up:.2f} times the speed of float at "
                f"batch {row.batch_size} and {row.threads} threads"
            )
