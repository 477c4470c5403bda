"""Export a finished run as one file, compare the file with the run, and time both."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import nn
from torch.export import ExportedProgram

from logitcache.errors import RecipeError
from logitcache.models import Classifier, Quantized, read_stored, weights_digest
from logitcache.models.quantization.fake_quantization import FakeQuantized, to_float, to_int8
from logitcache.runtime.versions import versions
from logitcache.shipping.elsewhere import Elsewhere, commands_elsewhere
from logitcache.shipping.exported import ExportedModel
from logitcache.shipping.graph import AS_RECORDED, PixelsToLogits, as_input, example, record, to_onnx, to_pt2
from logitcache.shipping.latency import FileLatency, Predict, file_latencies, warn_if_slow
from logitcache.shipping.metadata import (
    Arithmetic,
    Metadata,
    PixelType,
    Provenance,
    new_file,
    record_of,
    write_with_record,
)
from logitcache.shipping.parity import LEAST_INT8_AGREEMENT, TOLERANCE, Parity, compare
from logitcache.shipping.quantization.static_quantizer import count_fused
from logitcache.student.evaluation.cost import LatencyPlan, count_flops, count_parameters
from logitcache.student.evaluation.open_run import OpenedRun, open_run
from logitcache.student.evaluation.predict import evaluated_orientation, learns_several
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.trained import read_evaluation
from logitcache.views.augmentations.foreign import factories_of

Format = Literal["onnx", "pt2"]


@dataclass(frozen=True)
class ExportResult:
    """An exported run: the file, its record beside it, and how it compares with the run.

    `operators` are those that onnxruntime makes of an int8 file: all, those on integers, and layers with weights that
    stayed in float; None of other files. An int8 file is timed against the same network in float. `elsewhere` are
    commands for other runtimes.
    """

    run: str
    file: str
    record: str
    format: Format
    pixels: PixelType
    shape: tuple[int, ...]
    bytes: int
    weights: str
    operators: dict[str, int] | None
    parity: Parity
    latencies: tuple[FileLatency, ...]
    elsewhere: tuple[Elsewhere, ...]


def export(
    run: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    pixels: PixelType = "uint8",
    format: Format = "onnx",
    tolerance: float = TOLERANCE,
    least_agreement: float = LEAST_INT8_AGREEMENT,
    overwrite: bool = False,
    latency: LatencyPlan | None = None,
) -> ExportResult:
    """Export a finished run to `out`, by default RUN/model.onnx or RUN/model.pt2, and write `out`.json about it.

    The graph takes images of the evaluation's size and normalises them. The file is compared with the run on the CPU
    over all validation images before it is written: logits may differ by `tolerance` times the largest logit (at least
    1); for a quantised run, at least the share `least_agreement` of predictions must be equal. `overrides` name other
    images, as for `evaluate`. Raises RecipeError for a model that cannot be exported, MismatchError if the file's
    outputs differ.
    """
    run = Path(run)
    file = new_file(run / f"model.{format}" if out is None else out, overwrite, f".{format}")
    opened = open_run(run, [*overrides, *AS_RECORDED])
    network, image = opened.classifier.module, opened.validator.sample()[0]
    metadata = describe(run, opened, pixels, "int8" if isinstance(network, FakeQuantized) else "float32")
    made = _made(to_int8(network) if isinstance(network, FakeQuantized) else network, file, metadata, format)
    parity = compare(opened.classifier, made.predictor(), opened.validator)
    operators: dict[str, int] | None = None
    turns: tuple[FileLatency, ...] = ()
    if isinstance(network, FakeQuantized):  # the last bits of fused integer operators are other than those imitated
        parity.require_agreement(f"'{file}'", least_agreement)
        operators = count_fused(made.data, str(file)) if format == "onnx" else None
    else:
        parity.require(f"'{file}'", tolerance)
    if latency is not None:
        turns = tuple(file_latencies(_reference(opened, file, metadata, format), made.predictor, image, latency))
    result = ExportResult(
        run=str(run),
        file=str(file),
        record=str(record_of(file)),
        format=format,
        pixels=pixels,
        shape=metadata.shape,
        bytes=len(made.data),
        weights=metadata.run.weights,
        operators=operators,
        parity=parity,
        latencies=turns,
        elsewhere=commands_elsewhere(file, metadata),
    )
    if isinstance(network, FakeQuantized):
        stored = read_stored(run / "model.json").model
        kept = len(stored.keep_float) if isinstance(stored, Quantized) else 0
        warn_if_slow(result.file, 0 if operators is None else operators["float_layers"] - kept, turns)
    write_with_record(file, made.data, asdict(result), metadata)
    return result


class _Made(NamedTuple):
    """The bytes of a file, and what opens it to predict with a number of threads."""

    data: bytes
    predictor: Callable[..., Predict]


def _made(network: nn.Module, file: Path, metadata: Metadata, format: Format) -> _Made:
    """Turn a network into the bytes of a file. Raises RecipeError."""
    shipped = PixelsToLogits(Classifier(network, metadata.preprocessing), metadata.pixels)
    program = record(shipped, example(metadata.shape, metadata.pixels))
    if format == "pt2":
        return _Made(to_pt2(program, metadata), _runs(program, metadata.pixels))
    data = to_onnx(program, metadata)
    return _Made(data, ExportedModel(file, data, metadata).session)


def _reference(opened: OpenedRun, file: Path, metadata: Metadata, format: Format) -> Callable[..., Predict]:
    """Return what a file is timed against: eager torch or, of an int8 file, the same network in float."""
    network = opened.classifier.module
    if isinstance(network, FakeQuantized):
        return _made(to_float(network), file, metadata, format).predictor
    return lambda threads: opened.classifier


def _runs(program: ExportedProgram, pixels: PixelType) -> Callable[..., Predict]:
    """Return what makes a function of uint8 pixels for a number of threads, which torch sets."""
    module = program.module()
    return lambda threads=0: lambda images: module(as_input(images, pixels))


def describe(run: Path, opened: OpenedRun, pixels: PixelType, arithmetic: Arithmetic = "float32") -> Metadata:
    """Return the metadata of a run's export. Raises RecipeError if the run did not record its evaluation's transform.

    So it does for a transform of the user's own code, which a file cannot bring along.
    """
    recorded = read_evaluation(run)
    if recorded is None:
        raise RecipeError(
            f"{run} did not record how its images were evaluated (trained by an earlier release).\n"
            "  Fix: train it again, or one epoch more (--resume --set epochs=…), with this release"
        )
    if factories := factories_of(recorded.augmentations):
        raise RecipeError(
            f"{run} was evaluated through the factory '{factories[0]}', which no exported file can bring along.\n"
            "  Fix: validate on augmentations of the library, a resize and a crop"
        )
    stored, environment = read_stored(run / "model.json"), RunDirectory(str(run)).environment()
    image = opened.validator.sample()[0]
    channels, height, width = image.shape
    return Metadata(
        pixels=pixels,
        shape=(channels, height, width),
        num_classes=stored.num_classes,
        multi_label=learns_several(opened.recipe),
        arithmetic=arithmetic,
        orientation=evaluated_orientation(opened.recipe, recorded),
        preprocessing=opened.classifier.preprocessing,
        evaluation=recorded,
        run=Provenance(
            model=None if stored.model is None else stored.model.model_dump(mode="json"),
            weights=weights_digest(opened.classifier.module),
            learns_from=environment.learns_from,
            versions=versions(),
            num_parameters=count_parameters(opened.classifier) or None,
            flops=count_flops(opened.classifier, image) or None,
        ),
    )
