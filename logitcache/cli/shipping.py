"""The commands of shipping: export, quantize and prune."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from logitcache.cli.common import (
    BatchSizes,
    CommandResult,
    Overrides,
    Repeats,
    Resume,
    Threads,
    Trust,
    WarmUp,
    granted,
    latency_plan,
)

Run = Annotated[Path, Argument(metavar="RUN", help="A run folder.")]
Pixels = Annotated[
    Literal["uint8", "float"],
    Option("--pixels", help="Input of the graph: pixels from 0 to 255, or floats from 0 to 1."),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")]
Latency = Annotated[bool, Option("--latency", help="Time the file and eager PyTorch alternately.")]
LeastAgreement = Annotated[
    float,
    Option(
        "--least-agreement",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Least share of equal predictions of an int8 file.",
    ),
]


def export(
    run: Run,
    overrides: Overrides,
    trust: Trust,
    out: Annotated[
        Path | None,
        Argument(metavar="OUT", show_default="RUN/model.onnx", help="File to write; OUT.json records the comparison."),
    ] = None,
    pixels: Pixels = "uint8",
    format: Annotated[
        Literal["onnx", "pt2"], Option("--format", help="ONNX, or the format of torch.export, which only Python runs.")
    ] = "onnx",
    tolerance: Annotated[
        float,
        Option(
            "--tolerance",
            min=0.0,
            metavar="X",
            help="Largest difference of logits, relative to the largest logit or 1.",
        ),
    ] = 1e-4,
    least_agreement: LeastAgreement = 0.9,
    overwrite: Overwrite = False,
    latency: Latency = False,
    batch_size: BatchSizes = [],  # noqa: B006  # Typer's way
    threads: Threads = [],  # noqa: B006
    repeats: Repeats = None,
    warm_up: WarmUp = None,
) -> CommandResult:
    """Export a trained model as one file: ONNX, or torch.export's .pt2.

    The graph takes batches of any size, with images of the evaluation's size, and normalises them; the metadata hold
    the evaluation's transform, the class names and the digests of the run. The file is compared with the run on all
    validation images (--set validation.… chooses others), and written only if they agree.
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
        least_agreement=least_agreement,
        overwrite=overwrite,
        latency=plan,
    )
    follows = ("predict", result.file, "IMAGE") if format == "onnx" else ("evaluate", str(run))
    return CommandResult(asdict(result), follows=follows)


CalibrationImages = Annotated[
    int | None,
    Option("--images", min=1, metavar="N", show_default="256", help="Unaugmented training images to calibrate on."),
]
KeepFloat = Annotated[list[str], Option("--keep-float", metavar="LAYER", help="Keep a layer in float; repeatable.")]
KeepWorst = Annotated[
    int,
    Option(
        "--keep-worst", min=0, metavar="K", help="Measure the sensitivity of all layers, and keep the K worst in float."
    ),
]
Method = Annotated[
    Literal["onnxruntime", "pt2e"] | None,
    Option(
        "--method",
        show_default="onnxruntime",
        help="Quantise after training with onnxruntime, or with torchao's PT2E (extra quant).",
    ),
]
Qat = Annotated[
    bool,
    Option("--qat", help="Quantisation-aware training from the run's cache; OUT is the folder of the new run."),
]
QuantizedOut = Annotated[
    Path | None,
    Argument(
        metavar="OUT",
        show_default="RUN/model.int8.onnx",
        help="File to write; OUT.json records the comparison. With --qat, the folder of the new run.",
    ),
]
Sensitivity = Annotated[
    bool, Option("--sensitivity", help="List by how much quantising each layer alone changes the logits.")
]
Symmetric = Annotated[
    bool, Option("--symmetric", help="Make activations signed with zero point 0, as TensorRT requires.")
]


def quantize(
    run: Run,
    overrides: Overrides,
    trust: Trust,
    out: QuantizedOut = None,
    pixels: Pixels = "uint8",
    qat: Qat = False,
    resume: Annotated[bool, Option("--resume", help="With --qat: continue from the last checkpoint.")] = False,
    method: Method = None,
    symmetric: Symmetric = False,
    images: CalibrationImages = None,
    keep_float: KeepFloat = [],  # noqa: B006  # Typer's way
    keep_worst: KeepWorst = 0,
    sensitivity: Sensitivity = False,
    least_agreement: LeastAgreement = 0.9,
    overwrite: Overwrite = False,
    latency: Annotated[bool, Option("--latency", help="Time the int8 and the float file alternately.")] = False,
    batch_size: BatchSizes = [],  # noqa: B006
    threads: Threads = [],  # noqa: B006
    repeats: Repeats = None,
    warm_up: WarmUp = None,
) -> CommandResult:
    """Quantise a trained model to an int8 ONNX file, after training or, with --qat, by training.

    --qat continues distillation from the run's cache with the same losses, in a new run with a tenth of the epochs and
    of the learning rate; --set changes its recipe. Weights are signed 8-bit integers with one scale per channel,
    activations unsigned ones. The file is compared with the run on all validation images, and the integer operators
    that onnxruntime fuses are counted.
    """
    changes = [*overrides, *granted(trust)]
    both: dict[str, Any] = {
        "pixels": pixels,
        "keep_float": keep_float,
        "least_agreement": least_agreement,
        "overwrite": overwrite,
        "latency": latency_plan(latency, batch_size, threads, repeats, warm_up),
    }
    if qat:
        after = {"--method": method, "--symmetric": symmetric, "--images": images}
        after |= {"--keep-worst": keep_worst, "--sensitivity": sensitivity}
        folder = _qat_folder(out, [option for option, value in after.items() if value])
        from logitcache.shipping.quantization.quantization_aware import train_quantized
        from logitcache.student.distributed.ranks import joined

        with joined() as ranks:
            made = train_quantized(run, folder, changes, resume=resume, **both)
            follows = ("predict", made.exported.file, "IMAGE")
            return CommandResult(asdict(made), is_shown=ranks.is_first, follows=follows)
    if resume:
        raise BadParameter("has no effect without --qat", param_hint="--resume")
    from logitcache.shipping.quantization.quantize import quantize as quantized

    num_images, method = 256 if images is None else images, method or "onnxruntime"
    both |= {"keep_worst": keep_worst, "sensitivity": sensitivity, "symmetric": symmetric}
    result = quantized(run, out, changes, method=method, num_images=num_images, **both)
    return CommandResult(asdict(result), follows=("predict", result.file, "IMAGE"))


def _qat_folder(out: Path | None, unused: list[str]) -> Path:
    """Return the folder of the run that is trained; raise BadParameter if there is none, or for unused options."""
    if unused:
        raise BadParameter("has no effect with --qat: it is of quantising after training", param_hint=unused)
    if out is None:
        raise BadParameter("is missing: --qat trains a run, in a folder of its own", param_hint="OUT")
    return out


def prune(
    run: Run,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of the pruned run.")],
    overrides: Overrides,
    trust: Trust,
    macs: Annotated[
        float | None,
        Option(
            "--macs",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Remove channels until at most the share X of multiply-adds is left.",
        ),
    ] = None,
    latency: Annotated[
        float | None,
        Option(
            "--latency",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Remove channels until a batch takes at most X of its time here.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        Option("--sparsity", min=0.0, max=1.0, metavar="X", help="Set the share X of the weights to zero."),
    ] = None,
    unpruned: Annotated[
        list[str], Option("--unpruned", metavar="LAYER", help="Do not prune this layer; repeatable.")
    ] = [],  # noqa: B006  # Typer's way
    round_to: Annotated[
        int, Option("--round-to", min=1, metavar="N", help="Keep a multiple of N channels in each layer.")
    ] = 8,
    resume: Resume = False,
) -> CommandResult:
    """Prune a trained model, and fine-tune the rest from the same cache.

    Give one of --macs, --latency and --sparsity. OUT is an ordinary run: evaluate, predict, export and prune take it.
    Fine-tuning uses the run's own recipe; --set changes it, as in --set epochs=3 --set optimizer.lr=1e-4.
    """
    if sum(target is not None for target in (macs, latency, sparsity)) != 1:
        raise BadParameter("give one of the three", param_hint="--macs, --latency, --sparsity")
    from logitcache.runtime.tables import as_text
    from logitcache.shipping.prune import prune as pruned

    result = pruned(
        run,
        out,
        [*overrides, *granted(trust)],
        macs=macs,
        latency=latency,
        sparsity=sparsity,
        unpruned=unpruned,
        round_to=round_to,
        resume=resume,
    )
    document = asdict(result)
    return CommandResult(document, as_text(document), follows=("evaluate", str(out), "--latency"))
