"""Which models can be shipped: does a file answer as the model does, is int8 faster, can channels be removed?

    python benchmarks/shipping.py [--quick] [--json | --markdown]

Models of random weights, normalised for random images, are exported to ONNX and answer other random images beside eager
torch: the largest difference of logits over the largest logit (at least 1), and the fraction of equal answers; the same
of OpenVINO's CPU runtime on the file, where it is installed. Each model is then quantised after training, by
onnxruntime: int8 and the float file are timed in turns on one thread, as medians, and so are the float file and eager
torch. It is recorded for training in int8, and pruned to half of its multiply-adds. What is refused is reported with
its reason. A ResNet-18 must be twice as fast in int8. `--quick` takes two models, `--markdown` prints the table of
docs/how-to/ship-a-student.md. Exits 1 when a goal is missed.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from _harness import Row, exit_code, parser_of, print_json
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.models import (
    Classifier,
    Pruned,
    SmallCNN,
    StoredModel,
    Timm,
    Torchvision,
    default_preprocessing,
    save_model,
)
from logitcache.models.operations import flops_of
from logitcache.models.quantization.fake_quantization import imitate_int8
from logitcache.runtime.console import configure
from logitcache.runtime.device import own_randomness
from logitcache.runtime.tables import as_markdown
from logitcache.shipping.exported import ExportedModel
from logitcache.shipping.graph import PixelsToLogits, example, record, to_onnx
from logitcache.shipping.latency import file_latencies
from logitcache.shipping.metadata import Metadata, Provenance
from logitcache.shipping.parity import LEAST_AGREEMENT, TOLERANCE
from logitcache.shipping.quantization.static_quantizer import StaticQuantizer, count_fused
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.runs.trained import Evaluation
from logitcache.views.augmentations.crops import CenterCrop

Model = SmallCNN | Torchvision | Timm
T = TypeVar("T")
QUICK: tuple[tuple[str, Model, int], ...] = (
    ("small_cnn, 28 px", SmallCNN(), 28),
    ("resnet18, 64 px", Torchvision(name="resnet18", weights=None), 64),
)
CASES: tuple[tuple[str, Model, int], ...] = (
    *QUICK,
    ("mobilenet_v3_small, 64 px", Torchvision(name="mobilenet_v3_small", weights=None), 64),
    *(
        (f"{name}, 64 px", Timm(name=name, pretrained=False), 64)
        for name in ("mobilenetv4_conv_small", "efficientnet_lite0", "convnext_atto", "repvit_m0_9")
    ),
)
CLASSES, CHANNELS, IMAGES, BATCH = 10, 3, 64, 8
GOALS = {"resnet18, 64 px": 2.0}
"""How many times as fast int8 is as the float file; of other models the figure is given alone."""


@dataclass(frozen=True)
class Shipped:
    """What was measured of a model; texts are reasons of refusal, and None is what was not run."""

    model: str
    difference: float
    agreement: float
    openvino: float | None
    eager_over_onnx: float
    float_over_int8: float | str
    operators: dict[str, int] | None
    trained_for_int8: bool | str
    macs_left: float | str


def measured(name: str, entry: Model, size: int, folder: Path, repeats: int) -> Shipped:
    """Export, compare, quantise, time and prune a model."""
    plan = LatencyPlan(batch_sizes=(BATCH,), threads=(1,), repeats=repeats)
    with own_randomness(torch.device("cpu"), 0):
        network = entry.build(CLASSES, CHANNELS).module
        images = torch.randint(0, 256, (IMAGES, CHANNELS, size, size), dtype=torch.uint8)
        classifier = Classifier(network, default_preprocessing(CHANNELS))
        with torch.no_grad():
            for _ in range(20):  # until the running statistics are those of such images, and logits differ
                classifier.train()(torch.randint_like(images, 256))
    classifier.eval()
    metadata = Metadata(
        pixels="uint8",
        shape=(CHANNELS, size, size),
        num_classes=CLASSES,
        multi_label=False,
        arithmetic="float32",
        orientation="ignore",
        preprocessing=classifier.preprocessing,
        evaluation=Evaluation(augmentations=(CenterCrop(size=size),), epoch=1),
        run=Provenance(model=None, weights="", learns_from={}, versions={}),
    )
    program = record(PixelsToLogits(classifier, "uint8"), example(metadata.shape, "uint8"))
    file = ExportedModel(folder / "model.onnx", to_onnx(program, metadata), metadata)
    with torch.no_grad():
        own, other = classifier(images), file.session()(images)
    (eager,) = file_latencies(lambda threads: classifier, file.session, images[0], plan)

    def int8() -> tuple[float, dict[str, int]]:
        data = StaticQuantizer(file.data, images[:32], metadata).quantize()
        made = ExportedModel(folder / "int8.onnx", data, metadata)
        (turns,) = file_latencies(file.session, made.session, images[0], plan)
        return turns.speed_up, count_fused(data, name)

    quantized = unless_refused(int8)
    fused = (quantized, None) if isinstance(quantized, str) else quantized
    by_openvino = openvino(file.data, images)
    return Shipped(
        model=name,
        difference=difference(own, other),
        agreement=float((own.argmax(dim=1) == other.argmax(dim=1)).to(torch.float32).mean()),
        openvino=None if by_openvino is None else difference(own, by_openvino),
        eager_over_onnx=eager.speed_up,
        float_over_int8=fused[0],
        operators=fused[1],
        trained_for_int8=unless_refused(lambda: imitates(network, classifier.normalize(images[:2]))),
        macs_left=unless_refused(lambda: pruned(network, entry, size, folder)),
    )


def difference(own: Tensor, other: Tensor) -> float:
    """Return the largest difference of two logits, over the largest logit or 1."""
    return float((own - other).abs().max()) / max(1.0, float(own.abs().max()))


def unless_refused(make: Callable[[], T]) -> T | str:
    """Return what a function makes, or the reason why it refuses."""
    try:
        return make()
    except RecipeError as error:
        return str(error).partition("\n")[0].partition(" Fix: ")[0]


def imitates(network: nn.Module, images: Tensor) -> bool:
    """Record a network for training in int8, and take a step backwards through it."""
    trained = imitate_int8(network, CHANNELS, (images.shape[2], images.shape[3])).train()
    trained(images).square().mean().backward()
    return all(bool(p.grad.isfinite().all()) for p in trained.parameters() if p.grad is not None)


def pruned(network: nn.Module, entry: Model, size: int, folder: Path) -> float:
    """Remove channels down to half of the multiply-adds; return the part that is left."""
    described = default_preprocessing(CHANNELS)
    stored = StoredModel(model=entry, preprocessing=described, num_classes=CLASSES, in_channels=CHANNELS)
    save_model(folder, network, stored)
    smaller = Pruned(path=str(folder), macs=0.5, input_size=(size, size), round_to=2).build(CLASSES, CHANNELS).module
    image = torch.zeros(1, CHANNELS, size, size)
    return flops_of(smaller, image) / flops_of(network, image)


def openvino(data: bytes, images: Tensor) -> Tensor | None:
    """Return the logits of OpenVINO's CPU runtime, in float32; None if it is not installed."""
    try:
        from openvino import Core
    except ImportError:
        return None
    core = Core()
    compiled = core.compile_model(core.read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[compiled.output(0)])


def rows_of(one: Shipped) -> Iterator[Row]:
    """Return the figures of a model beside their goals."""
    yield Row(f"{one.model}: difference", 1e6 * one.difference, 1e6 * TOLERANCE, "e-6", at_most=True)
    yield Row(f"{one.model}: agreement", 100 * one.agreement, 100 * LEAST_AGREEMENT, "%")
    if one.openvino is not None:
        yield Row(f"{one.model}: OpenVINO", 1e6 * one.openvino, 1e6 * TOLERANCE, "e-6", at_most=True)
    yield Row(f"{one.model}: eager / ONNX", one.eager_over_onnx, 0.0)
    ratio = 0.0 if isinstance(one.float_over_int8, str) else one.float_over_int8
    yield Row(f"{one.model}: float / int8", ratio, GOALS.get(one.model, 0.0), note=of_operators(one))
    is_trained = float(one.trained_for_int8 is True)
    yield Row(f"{one.model}: trained for int8", is_trained, 0.0, note=reason(one.trained_for_int8))
    left = 0.0 if isinstance(one.macs_left, str) else 100 * one.macs_left
    yield Row(f"{one.model}: multiply-adds left", left, 0.0, "%", note=reason(one.macs_left))


def of_operators(one: Shipped) -> str:
    """Describe the operators of an int8 file."""
    found = one.operators
    if found is None:
        return reason(one.float_over_int8)
    return f"{found['integer']} of {found['all']} operators on integers, {found['float_layers']} layers in float"


def reason(value: object) -> str:
    """Return a reason of refusal, or nothing."""
    return value if isinstance(value, str) else ""


def shown(one: Shipped) -> dict[str, str]:
    """Return a model's row of the documentation."""
    speed, left = one.float_over_int8, one.macs_left
    return {
        "model": one.model,
        "largest difference": millionths(one.difference),
        "equal answers": f"{100 * one.agreement:.4g} %",
        "by OpenVINO": "not run" if one.openvino is None else millionths(one.openvino),
        "ONNX over eager": f"{one.eager_over_onnx:.3g} ×",
        "int8 over float ONNX": f"refused: {speed}" if isinstance(speed, str) else f"{speed:.2f} ×",
        "integer operators": "" if one.operators is None else f"{one.operators['integer']} of {one.operators['all']}",
        "training for int8": "yes" if one.trained_for_int8 is True else f"refused: {one.trained_for_int8}",
        "multiply-adds left": f"refused: {left}" if isinstance(left, str) else f"{100 * left:.0f} %",
    }


def millionths(value: float) -> str:
    """Format a small number."""
    return f"{1e6 * value:.2f} · 10⁻⁶" if value >= 1e-8 else "below 0.01 · 10⁻⁶"


def main() -> int:
    """Measure the models, print rows or a table, and return the exit code."""
    parser = parser_of(__doc__, "two models")
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation")
    arguments = parser.parse_args()
    configure(quiet=True)
    torch.set_num_threads(1)
    found: list[Shipped] = []
    for name, entry, size in QUICK if arguments.quick else CASES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(name, entry, size, Path(folder), 9 if arguments.quick else 15))
        if not (arguments.json or arguments.markdown):
            print("\n".join(row.line(44) for row in rows_of(found[-1])), flush=True)
    if arguments.json:
        print_json([asdict(one) for one in found])
    if arguments.markdown:
        print(as_markdown([shown(one) for one in found]), end="")
    return exit_code(row.met for one in found for row in rows_of(one))


if __name__ == "__main__":
    sys.exit(main())
