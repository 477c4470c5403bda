"""The commands of shipping: export and quantize."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from logitcache.cli.common import (
    BatchSizes,
    CommandResult,
    Overrides,
    Repeats,
    Threads,
    Trust,
    WarmUp,
    granted,
    latency_plan,
)

Run = Annotated[Path, Argument(metavar="RUN", help="A folder made by training.")]
Pixels = Annotated[
    Literal["uint8", "float"],
    Option("--pixels", help="What the graph takes and normalises: pixels of 0 to 255, or floats of 0 to 1."),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")]
Latency = Annotated[bool, Option("--latency", help="Time the file against eager torch, by turns.")]


def export(
    run: Run,
    overrides: Overrides,
    trust: Trust,
    out: Annotated[
        Path | None, Argument(metavar="OUT", show_default="RUN/model.onnx", help="The file; its record lies beside it.")
    ] = None,
    pixels: Pixels = "uint8",
    format: Annotated[
        Literal["onnx", "pt2"], Option("--format", help="ONNX, or the format of torch.export, which Python alone runs.")
    ] = "onnx",
    tolerance: Annotated[
        float,
        Option("--tolerance", min=0.0, metavar="X", help="Largest difference of logits, over the largest logit or 1."),
    ] = 1e-4,
    overwrite: Overwrite = False,
    latency: Latency = False,
    batch_size: BatchSizes = [],  # noqa: B006  # Typer's way
    threads: Threads = [],  # noqa: B006
    repeats: Repeats = None,
    warm_up: WarmUp = None,
) -> CommandResult:
    """Export a trained model as one file: ONNX, or torch.export's .pt2.

    It takes batches of any number of images of the evaluation's size and normalises them; the metadata hold the
    evaluation's transform, the class names and the digests of the run. The file is compared with the run over all
    validation images, which --set validation.… chooses, and written only if they agree.
    """
    from logitcache.shipping.export import export as exported

    plan = latency_plan(latency, batch_size, threads, repeats, warm_up)
    result = exported(
        run,
        out,
        [*overrides, *granted(trust)],
        pixels=pixels,
        format=format,
        tolerance=tolerance,
        overwrite=overwrite,
        latency=plan,
    )
    follows = ("predict", result.file, "IMAGE") if format == "onnx" else ("evaluate", str(run))
    return CommandResult(asdict(result), follows=follows)


def quantize(
    run: Run,
    overrides: Overrides,
    trust: Trust,
    out: Annotated[
        Path | None,
        Argument(metavar="OUT", show_default="RUN/model.int8.onnx", help="The file; its record lies beside it."),
    ] = None,
    pixels: Pixels = "uint8",
    images: Annotated[
        int, Option("--images", min=1, metavar="N", help="Unaugmented training images for the ranges of activations.")
    ] = 256,
    keep_float: Annotated[
        list[str], Option("--keep-float", metavar="LAYER", help="Keep a layer in float; repeatable.")
    ] = [],  # noqa: B006  # Typer's way
    keep_worst: Annotated[
        int, Option("--keep-worst", min=0, metavar="K", help="Measure all layers, and keep the K worst in float.")
    ] = 0,
    sensitivity: Annotated[
        bool, Option("--sensitivity", help="List by how much each layer alone, quantised, changes the logits.")
    ] = False,
    least_agreement: Annotated[
        float,
        Option(
            "--least-agreement", min=0.0, max=1.0, metavar="X", help="Fraction of answers that are the float run's."
        ),
    ] = 0.9,
    overwrite: Overwrite = False,
    latency: Annotated[bool, Option("--latency", help="Time int8 against the float file, by turns.")] = False,
    batch_size: BatchSizes = [],  # noqa: B006
    threads: Threads = [],  # noqa: B006
    repeats: Repeats = None,
    warm_up: WarmUp = None,
) -> CommandResult:
    """Quantise a trained model to int8 after training, as one ONNX file.

    Weights are signed 8-bit integers with a scale for each channel, activations unsigned ones. The file is compared
    with the run over all validation images; the integer operators that onnxruntime fuses are counted.
    """
    from logitcache.shipping.quantize import quantize as quantized

    result = quantized(
        run,
        out,
        [*overrides, *granted(trust)],
        pixels=pixels,
        num_images=images,
        keep_float=keep_float,
        keep_worst=keep_worst,
        sensitivity=sensitivity,
        least_agreement=least_agreement,
        overwrite=overwrite,
        latency=latency_plan(latency, batch_size, threads, repeats, warm_up),
    )
    return CommandResult(asdict(result), follows=("predict", result.file, "IMAGE"))
