"""How much faster are stage one's variants of a teacher's network than the loop that a user writes?

    python benchmarks/teacher.py [--quick] [--json]

Theirs: `model(images)` in float32 under no_grad, as built; ours: the teacher of stage one in the variant that `speed:
auto` takes, or compiled (the time to compile is not counted), its own time for normalising and copying answers
included. Both take turns in one process on the same batch, and a figure is the median ratio of wall-clock times: how
often as fast ours is. Weights are random, statistics of BatchNorm too. bfloat16 is timed if the CPU has it. `--quick`
takes 8 images of ResNet-50 in place of 32 of each. Exits 1 if a goal is missed.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import torchvision
from _harness import Row, parser_of, run_benchmark
from torch import nn

from logitcache.classifier import Preprocessing, Variant
from logitcache.runtime.device import Precision
from logitcache.teacher.speed import settle_variants
from logitcache.teacher.teacher import TeacherSource, build_teacher

PREPROCESSING = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
COMPILED = Variant(channels_last=True, fold=True, compile=True)
CASES: tuple[tuple[str, Precision, Literal["auto"] | Variant, float], ...] = (
    ("resnet50", "float32", "auto", 1.5),
    ("resnet50", "bfloat16", "auto", 2.5),
    ("resnet50", "float32", COMPILED, 1.5),
    ("mobilenet_v3_large", "float32", "auto", 1.0),
    ("mobilenet_v3_large", "float32", COMPILED, 1.0),
    ("vit_b_16", "float32", "auto", 0.95),
)
"""Networks, variants and goals: of others than ResNet-50, that they are never slower, within what timing shows."""

ROUNDS = 3


def network(name: str) -> nn.Module:
    """Build a network of torchvision whose BatchNorm has statistics of its own."""
    torch.manual_seed(0)
    built: nn.Module = torchvision.models.get_model(name)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return built.eval()


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(name: str, precision: Precision, speed: Literal["auto"] | Variant, count: int) -> tuple[float, str]:
    """Return how often as fast stage one is, and the variant that it took."""
    module = network(name)
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    labels = torch.full((count,), -1)
    source = TeacherSource(preprocessing=PREPROCESSING, precision=precision, speed=speed)
    teacher = build_teacher("t", source, module, None, 3, torch.device("cpu"))
    settle_variants([teacher], {"t": source}, {}, pixels, labels, count)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    plain = network(name)

    @torch.no_grad()
    def theirs() -> object:
        return plain((pixels.float() / 255 - mean) / std)

    times: list[float] = []
    for number in range(ROUNDS + 1):
        both = seconds(theirs), seconds(lambda: teacher(pixels, labels))
        times += [both[0] / both[1]] if number else []
    return statistics.median(times), teacher.variant.text


def rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield the figures of all networks."""
    for name, precision, speed, goal in CASES[: 2 if quick else None]:
        if precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
            continue
        found, variant = ratio(name, precision, speed, 8 if quick else 32)
        yield Row(f"{name}, {precision}", found, goal, note=variant)


if __name__ == "__main__":
    sys.exit(run_benchmark(parser_of(__doc__, "8 images", "unused"), rows, width=30, num_threads=None))
