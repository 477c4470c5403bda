"""Does an exported file answer as the model does, and is int8 faster?

    python benchmarks/shipping.py [--quick] [--json] [--folder DIR]

Models of random weights are exported to ONNX and answer random images beside eager torch: the largest difference of
logits over the largest logit (at least 1), and the fraction of equal answers. Each is then quantised after training, by
onnxruntime: int8 and the float file are timed in turns on two threads, as medians, and so are the float file and eager
torch. A ResNet-18 must be twice as fast in int8. `--quick` takes two models. Exits 1 when a goal is missed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from _harness import Row, parser_of, run_benchmark

from logitcache.errors import RecipeError
from logitcache.models import Classifier, SmallCNN, Timm, Torchvision, default_preprocessing
from logitcache.runtime.device import own_randomness
from logitcache.shipping.exported import ExportedModel
from logitcache.shipping.graph import PixelsToLogits, example, record, to_onnx
from logitcache.shipping.latency import file_latencies
from logitcache.shipping.metadata import Metadata, Provenance
from logitcache.shipping.parity import LEAST_AGREEMENT, TOLERANCE
from logitcache.shipping.static_quantizer import StaticQuantizer, count_fused
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.runs.trained import Evaluation
from logitcache.views.augmentations.crops import CenterCrop

QUICK = (("small_cnn, 28 px", SmallCNN(), 28), ("resnet18, 64 px", Torchvision(name="resnet18", weights=None), 64))
CASES = (
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


def rows_of(folder: Path, quick: bool) -> Iterator[Row]:
    """Export, compare, quantise and time each model."""
    plan = LatencyPlan(batch_sizes=(BATCH,), threads=(2,), repeats=15 if quick else 31)
    for name, entry, size in QUICK if quick else CASES:
        with own_randomness(torch.device("cpu"), 0):
            network = entry.build(CLASSES, CHANNELS).module.eval()
            images = torch.randint(0, 256, (IMAGES, CHANNELS, size, size), dtype=torch.uint8)
        classifier = Classifier(network, default_preprocessing(CHANNELS)).eval()
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
        scale = max(1.0, float(own.abs().max()))
        difference = float((own - other).abs().max()) / scale
        yield Row(f"{name}: difference", 1e6 * difference, 1e6 * TOLERANCE, "e-6", at_most=True)
        agreement = float((own.argmax(dim=1) == other.argmax(dim=1)).to(torch.float32).mean())
        yield Row(f"{name}: agreement", 100 * agreement, 100 * LEAST_AGREEMENT, "%")
        (turns,) = file_latencies(lambda threads, model=classifier: model, file.session, images[0], plan)
        yield Row(f"{name}: eager / ONNX", turns.speed_up, 0.0, note=f"{1e3 * turns.file_seconds:.2f} ms")
        try:
            data = StaticQuantizer(file.data, images[:32], metadata).quantize()
        except RecipeError as error:
            yield Row(f"{name}: float / int8", 0.0, GOALS.get(name, 0.0), note=str(error).partition("\n")[0][:60])
            continue
        int8 = ExportedModel(folder / "int8.onnx", data, metadata)
        fused = count_fused(data, name)
        (turns,) = file_latencies(file.session, int8.session, images[0], plan)
        note = f"{fused['integer']} of {fused['all']} operators on integers, {fused['float_layers']} layers in float"
        yield Row(f"{name}: float / int8", turns.speed_up, GOALS.get(name, 0.0), note=note)


if __name__ == "__main__":
    sys.exit(run_benchmark(parser_of(__doc__, "two models", "where files go"), rows_of, 40, num_threads=2))
