"""How many bytes does a row of logits take in each encoding, and how far is what is decoded from what was encoded?

    python benchmarks/encodings.py [--quick] [--json] [--logits FILE.npz]

FILE.npz holds an array `imagenet`, float [4·n, C]: row r·n + i is the answer of a teacher to view r of image i. Any
teacher's answers to four views of some hundred images will do, saved with numpy.savez(FILE, imagenet=logits). Without a
file logits of a random linear head are made, which only shows that everything runs: no goal is judged.

Everything that is fitted is fitted on four fifths of the images and judged on the others, five times, so that every row
is judged once. Bytes are those of one chunk of all judged rows, compressed as packed arrays are; the tables of a fit,
stored once in a cache, are not counted. KL is KL(full ‖ decoded) in nats, its mean and its 99.9th percentile. "At equal
bytes" means on the lines, log KL over log bytes, through the figures of each encoding.

The last lines compare the transform with the rate-distortion bound of its own model, independent Gaussian coefficients:
the bits of a row's coefficients as they are stored, without corrections, less the fewest bits that any code of such
coefficients takes at the squared error that the transform makes, divided by the number of coefficients that the bound
gives bits to. `fitted` are the variances that the transform was fitted with, `judged` those of the rows that are
judged, in the same basis. Logits are not Gaussian: a code may be below the bound of the model.
Exits 1 when a goal is missed.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import exit_code, parser_of, print_json, seconds
from _rate_distortion import above_bound
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import resnet18

from logitcache.cache.encodings.base import LogitsCodec
from logitcache.cache.encodings.basis import Basis, fit_basis
from logitcache.cache.encodings.dense import Dense
from logitcache.cache.encodings.fitted_transform import FittedTransform
from logitcache.cache.encodings.measure import ErrorMeter, chunk_bytes, stored
from logitcache.cache.encodings.top_k import PackedTopK, TopK
from logitcache.cache.encodings.transform import Transform
from logitcache.cache.encodings.uint8 import UInt8
from logitcache.cache.format.arrays import Order
from logitcache.logits import log_probs
from logitcache.runtime.console import configure

NUM_VIEWS, NUM_FOLDS = 4, 5
TEMPERATURES = (1.0, 2.0, 4.0)
STEPS = (4.0, 2.8, 2.0, 1.4, 1.0, 0.9, 0.8, 0.6, 0.5, 0.45, 0.4, 0.28, 0.2)
QUICK_STEPS = (1.8, 0.84, 0.78, 0.46, 0.44)
CORRECTIONS = (64, 32, 0)
RANKS = (5, 10, 20, 50, 100, 150, 200, 250, 300)
GOALS = ((215, 1.0, 5.0), (215, 4.0, 10.0), (320, 1.0, 10.0), (320, 4.0, 25.0))
"""At so many bytes and this temperature, how many times as large packed top-k's KL is to be."""

TOP_10_BYTES, DECODE_SHARE, BATCH, STEP_IMAGES = 24.0, 0.02, 256, 8


class Fold(NamedTuple):
    """Calibration rows [N, C] with the images they show, and the rows that are judged."""

    fitted: Tensor
    images: Tensor
    judged: Tensor


def load(file: Path | None) -> list[Fold]:
    """Load logits, or make some, and split them by image."""
    logits = made() if file is None else torch.from_numpy(np.load(file)["imagenet"].astype(np.float32))
    num_images = len(logits) // NUM_VIEWS
    shuffled = np.random.default_rng(0).permutation(num_images)
    images, logits = torch.arange(NUM_VIEWS * num_images) % num_images, logits[: NUM_VIEWS * num_images]
    folds = []
    for number in range(NUM_FOLDS):
        is_judged = torch.isin(images, torch.from_numpy(shuffled[number::NUM_FOLDS]))
        folds.append(Fold(logits[~is_judged], images[~is_judged], logits[is_judged]))
    return folds


def made(num_images: int = 250, num_classes: int = 400) -> Tensor:
    """Make logits as a linear head of fewer dimensions than classes does, alike for the views of an image."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, num_images, 96, generator=generator) + 0.4 * torch.randn(
        NUM_VIEWS, num_images, 96, generator=generator
    )
    scale = torch.linspace(1.0, 0.05, 96)
    return (hidden.exp() * scale).flatten(0, 1) @ torch.randn(96, num_classes, generator=generator) / 8


def candidates(
    folds: list[Fold], bases: list[Basis], quick: bool
) -> Iterator[tuple[str, dict[str, Any], list[LogitsCodec], bool]]:
    """Yield family, fields, the encoding as each fold fits it, and whether it is stored compressed."""
    num_classes, count = folds[0].judged.shape[1], len(folds)
    yield "dense float16", {}, [Dense()] * count, False
    yield "uint8", {}, [UInt8()] * count, False
    ranks = [k for k in RANKS if k < num_classes]
    for k in ranks:
        yield "top_k", {"k": k}, [TopK(k=k)] * count, False
    for k in ranks:
        yield "packed_top_k", {"k": k}, [PackedTopK(k=k)] * count, True
    for corrections in CORRECTIONS[: 1 if quick else None]:
        for step in QUICK_STEPS if quick else STEPS:
            transform = Transform(step=step, corrections=min(corrections, num_classes))
            fitted = [transform.with_basis(basis, fold.fitted) for basis, fold in zip(bases, folds, strict=True)]
            yield "transform", {"step": step, "corrections": corrections}, [*fitted], True


def judge(
    family: str, fields: dict[str, Any], encodings: list[LogitsCodec], compressed: bool, folds: list[Fold]
) -> dict[str, Any]:
    """Measure one encoding on the rows that each fold did not fit it to."""
    meter, parts = ErrorMeter(TEMPERATURES), {}
    for encoding, (_, _, judged) in zip(encodings, folds, strict=True):
        arrays = stored(encoding, judged)
        rows = {name: torch.from_numpy(values) for name, values in arrays.items()}
        meter.add(judged, encoding.decode(rows, judged.shape[1]))
        for row in encoding.arrays(judged.shape[1]):
            parts.setdefault((row.suffix, row.order), []).append(arrays[row.suffix].reshape(len(judged), -1))
    num_rows = sum(len(fold.judged) for fold in folds)
    errors = meter.errors()
    return {
        "family": family,
        **fields,
        "bytes": round(sum(kept_bytes(part, order, compressed) for (_, order), part in parts.items()) / num_rows, 2),
        "mean": {f"{error.temperature:g}": error.mean for error in errors},
        "p99.9": {f"{error.temperature:g}": error.p999 for error in errors},
    }


def kept_bytes(parts: list[NDArray[Any]], order: Order, compressed: bool) -> int:
    """Return the bytes of the rows of all folds in one chunk; where one has more numbers, others have zeros."""
    widest = max(part.shape[1] for part in parts)
    rows = np.concatenate([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts])
    return chunk_bytes(rows, order) if compressed else rows.nbytes


def bounds(folds: list[Fold], bases: list[Basis], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield, for each step, how far the transform's coefficients are from the bound of their Gaussian model."""
    judged = [fold.judged for fold in folds]
    for step in QUICK_STEPS if quick else STEPS:
        transform = Transform(step=step, corrections=0)
        fitted = [transform.with_basis(basis, fold.fitted) for basis, fold in zip(bases, folds, strict=True)]
        parts: dict[str, list[NDArray[Any]]] = {}
        for one, rows in zip(fitted, judged, strict=True):
            arrays = stored(one, rows)
            for name, _, _ in one.form.coefficient_parts:
                parts.setdefault(name, []).append(arrays[name].reshape(len(rows), -1))
        num_bits = 8 * sum(kept_bytes(part, "component", True) for part in parts.values())
        yield above_bound(step, num_bits / sum(map(len, judged)), fitted, bases, judged)


def at_bytes(results: list[dict[str, Any]], family: str, num_bytes: float, temperature: float) -> float:
    """Return the mean KL of a family at so many bytes, on the line through its figures; a transform's with 64."""
    chosen = [row for row in results if row["family"] == family and row.get("corrections", 64) == 64]
    points = sorted((row["bytes"], row["mean"][f"{temperature:g}"]) for row in chosen)
    sizes, divergences = np.log(np.asarray(points)).T
    return float(np.exp(np.interp(np.log(num_bytes), sizes, divergences)))


def decode_share(fitted: FittedTransform, logits: Tensor, rounds: int) -> float:
    """Return the time of decoding a batch of 256, divided by that of a training step on as many images of 224 px."""
    batch = logits.repeat(-(-BATCH // len(logits)), 1)[:BATCH]
    encoded = {name: torch.from_numpy(values) for name, values in stored(fitted, batch).items()}
    model = resnet18()
    images, labels = torch.randn(STEP_IMAGES, 3, 224, 224), torch.zeros(STEP_IMAGES, dtype=torch.long)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    def decode() -> None:
        log_probs(fitted.decode(encoded, logits.shape[1]), 2.0)

    step(), decode()
    clock = time.perf_counter
    shares = [seconds(decode, clock) / (seconds(step, clock) * BATCH / STEP_IMAGES) for _ in range(rounds)]
    return statistics.median(shares)


def goals(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the transform with packed top-k at equal bytes, and look at the size of top-10."""
    compared = []
    for num_bytes, temperature, goal in GOALS:
        rival, ours = (at_bytes(results, family, num_bytes, temperature) for family in ("packed_top_k", "transform"))
        name = f"KL of packed top-k / transform, {num_bytes} bytes, T = {temperature:g}"
        compared.append({"goal": name, "figure": rival / ours, "least": goal, "met": rival >= goal * ours})
    size = next(row["bytes"] for row in results if row["family"] == "packed_top_k" and row["k"] == 10)
    compared.append({"goal": "bytes of top-10", "figure": size, "most": TOP_10_BYTES, "met": size <= TOP_10_BYTES})
    return compared


def show(results: list[dict[str, Any]], bounded: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    """Print the frontier, the distance to the bound, and the goals beside the figures."""
    print(f"{'':<46} bytes " + "".join(f"   T={at:g}: mean    p99.9" for at in TEMPERATURES))
    for row in results:
        fields = ", ".join(f"{name} {row[name]:g}" for name in ("k", "step", "corrections") if name in row)
        figures = "".join(f"   {row['mean'][at]:9.2e} {row['p99.9'][at]:8.1e}" for at in ("1", "2", "4"))
        print(f"{row['family'] + ' ' + fields:<42} {row['bytes']:>9.1f} {figures}")
    for row in bounded:
        excess = "   ".join(
            f"{name} {row[f'{name}_bits']:6.0f} of {row[f'{name}_active']:4.0f}, {row[f'{name}_excess']:+.3f} each"
            for name in ("fitted", "judged")
        )
        print(f"bits of coefficients, step {row['step']:<4g} {row['bits']:7.0f}   bounds: {excess}")
    for row in compared:
        bound = f">= {row['least']:g}" if "least" in row else f"<= {row['most']:g}"
        print(f"{row['goal']:<56} {row['figure']:>8.4g}   goal {bound}{'' if row['met'] else '   MISSED'}")


def main() -> int:
    """Print the whole frontier, and the goals beside the figures."""
    parser = parser_of(__doc__, "fewer steps of the transform")
    parser.add_argument("--logits", type=Path, metavar="FILE.npz", help="logits of a teacher; see above")
    arguments = parser.parse_args()
    configure(quiet=True)
    torch.manual_seed(0)
    folds = load(arguments.logits)
    judged, last = [], None
    bases = [fit_basis(fold.fitted, fold.images) for fold in folds]
    for family, fields, encodings, compressed in candidates(folds, bases, arguments.quick):
        judged.append(judge(family, fields, encodings, compressed, folds))
        last = encodings[0]
    bounded = list(bounds(folds, bases, arguments.quick))
    compared = goals(judged) if arguments.logits else []
    assert isinstance(last, FittedTransform)
    share = decode_share(last, folds[0].judged, 3 if arguments.quick else 9)
    name = "time of decoding 256 rows / step of ResNet-18 on 256"
    compared.append({"goal": name, "figure": share, "most": DECODE_SHARE, "met": share <= DECODE_SHARE})
    if arguments.json:
        print_json(judged, bounds=bounded, goals=compared)
    else:
        show(judged, bounded, compared)
    return exit_code(row["met"] for row in compared)


if __name__ == "__main__":
    sys.exit(main())
