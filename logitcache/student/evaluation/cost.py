"""What a model costs: parameters, bytes, operations and time."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from logitcache.config.recipe import Component, Count
from logitcache.models.operations import flops_of
from logitcache.runtime.device import Precision, autocast, synchronize

STUDENT = "student"


@dataclass(frozen=True)
class Contender:
    """A model to weigh: uint8 pixels [B, C, H, W] in, logits out, in a precision.

    `image_shape` [C, H, W] is that of its images, if they are not the student's: of a pairing a teacher has its own.
    """

    model: nn.Module
    precision: Precision
    image_shape: tuple[int, int, int] | None = None

    def pixels_like(self, pixels: Tensor) -> Tensor:
        """Return pixels [..., C, H, W] that the model takes in place of a student's: the same, or black ones."""
        if self.image_shape is None:
            return pixels
        return pixels.new_zeros((*pixels.shape[:-3], *self.image_shape))


@dataclass(frozen=True)
class Cost:
    """What a model takes: parameters, bytes of its state, floating-point operations for one image.

    A multiplication and its addition are two operations; those of convolutions, matrix products and attention count.
    `compression` is how many times the student's parameters these are, `bytes_ratio` and `flops_ratio` likewise. None
    for a teacher that is not at hand.
    """

    model: str
    num_parameters: int | None
    bytes: int | None
    flops: int | None
    compression: float | None
    bytes_ratio: float | None
    flops_ratio: float | None


class LatencyPlan(Component):
    """How to time: batch sizes, threads (on the CPU; by default as many as torch has), and how often."""

    batch_sizes: tuple[Count, ...] = (1, 32)
    threads: tuple[Count, ...] = ()
    warm_up: Count = 5
    repeats: Count = 30

    def batches(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield numbers of threads, each with batches [B, C, H, W] of an image [C, H, W]."""
        for threads, count in itertools.product(self.threads or (torch.get_num_threads(),), self.batch_sizes):
            yield threads, image.expand(count, *image.shape).contiguous()


@dataclass(frozen=True)
class Latency:
    """The median time of a batch whose pixels are on the device, and what it makes in images per second.

    `speed_up` is how many times as fast the student is, in a teacher's row.
    """

    model: str
    batch_size: int
    threads: int
    device: str
    precision: Precision
    seconds: float
    images_per_second: float
    speed_up: float | None


def costs(student: nn.Module, teachers: Mapping[str, Contender | None], image: Tensor) -> tuple[Cost, ...]:
    """Weigh the student, then its teachers; `image` is uint8 [C, H, W], on the device of the student."""
    own = _weigh(student, image)
    rows = [Cost(STUDENT, *own, None, None, None)]
    for name, teacher in teachers.items():
        found = (None, None, None) if teacher is None else _weigh(teacher.model, teacher.pixels_like(image))
        pairs = zip(found, own, strict=True)
        ratios = [None if count is None or not students else count / students for count, students in pairs]
        rows.append(Cost(name, *found, *ratios))
    return tuple(rows)


@torch.no_grad()
def failing(teachers: Mapping[str, Contender | None], image: Tensor) -> dict[str, str]:
    """Return by name why teachers fail on an image, uint8 [C, H, W]: what their networks raise."""
    reasons = {}
    for name, teacher in teachers.items():
        try:
            if teacher is not None:
                own = teacher.pixels_like(image)
                teacher.model.eval()(own[None])
        except Exception as error:  # the network's own code may raise anything
            reasons[name] = f"its network fails on an image, uint8 {list(own.shape)}: {error}"
    return reasons


def _weigh(model: nn.Module, image: Tensor) -> tuple[int, int, int]:
    return count_parameters(model), count_bytes(model), count_flops(model, image)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers as they are kept, shared ones once."""
    state = {(tensor.data_ptr(), tensor.shape): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def count_flops(model: nn.Module, image: Tensor) -> int:
    """Return the floating-point operations for an image, uint8 [C, H, W], as torch's FlopCounterMode counts them."""
    return flops_of(model, image[None])


def latencies(
    student: Contender, teachers: Mapping[str, Contender | None], image: Tensor, plan: LatencyPlan
) -> tuple[Latency, ...]:
    """Time the student, and those of its teachers that are at hand, in turns on the device of `image`.

    `image`: uint8 [C, H, W], of which batches are made. Neither the copy to the device nor torch.compile is part of it.
    """
    rows, device = [], str(image.device)
    contenders = [(name, teacher) for name, teacher in teachers.items() if teacher is not None]
    for threads, pixels in plan.batches(image):
        count = len(pixels)
        timed = [(student, pixels), *((teacher, pixels) for _, teacher in contenders)]
        own, *others = median_seconds(timed, threads, plan.warm_up, plan.repeats)
        rows.append(Latency(STUDENT, count, threads, device, student.precision, own, count / own, None))
        for (name, teacher), taken in zip(contenders, others, strict=True):
            rows.append(Latency(name, count, threads, device, teacher.precision, taken, count / taken, taken / own))
    return tuple(rows)


def median_seconds(timed: Sequence[tuple[Contender, Tensor]], threads: int, warm_up: int, repeats: int) -> list[float]:
    """Return the median seconds of each model on its batch, uint8 [B, C, H, W], timed in turns."""
    for contender, _ in timed:
        contender.model.eval()
    calls = [partial(_predict, contender, contender.pixels_like(pixels)) for contender, pixels in timed]
    return time_in_turns(calls, threads, warm_up, repeats)


def _predict(contender: Contender, pixels: Tensor) -> None:
    with autocast(pixels.device, contender.precision):
        contender.model(pixels)
    synchronize(pixels.device)


@torch.inference_mode()
def time_in_turns(calls: Sequence[Callable[[], object]], threads: int, warm_up: int, repeats: int) -> list[float]:
    """Return the median seconds of each call: in every round all are timed, in alternating order.

    What else the machine does meanwhile then slows all of them. torch computes with so many threads; the first
    `warm_up` rounds do not count.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    pairs = list(zip(calls, seconds, strict=True))
    with _limited_threads(threads):
        for number in range(warm_up + repeats):
            for call, found in pairs[:: -1 if number % 2 else 1]:
                started = time.perf_counter()
                call()
                found.append(time.perf_counter() - started)
    return [max(statistics.median(found[warm_up:]), 1e-9) for found in seconds]


@contextmanager
def _limited_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
