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
