"""Train a run's network for int8 on what the run learnt from, and export it: an ordinary run whose parent it names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import RecipeError
from logitcache.shipping.export import ExportResult, export
from logitcache.shipping.fine_tuning import STATED, evaluated_size, fine_tuning_recipe
from logitcache.shipping.metadata import PixelType
from logitcache.shipping.parity import LEAST_INT8_AGREEMENT
from logitcache.student.distributed.ranks import joined
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.runs.run_result import RunResult
from logitcache.student.training import AnyRecipe, train

_PART = 10
"""Training for int8 takes this part of the parent's epochs and learning rate, if these are not set."""


@dataclass(frozen=True)
class QuantizationAwareResult:
    """What the training measured with int8 imitated, and the int8 file of it."""

    parent: str
    trained: RunResult
    exported: ExportResult


def quantization_aware_recipe(
    run: str | Path, out: str | Path, overrides: Sequence[str] = (), keep_float: Sequence[str] = ()
) -> AnyRecipe:
    """Return the recipe of a run with its network trained for int8 in `out`: the same data, losses and all else.

    A tenth of its epochs, at least one, by a tenth of its learning rate, unless `overrides` set them. Raises
    RecipeError for a run whose losses read taps.
    """
    run = Path(run)
    model = {"kind": "quantized", "input_size": list(evaluated_size(run)), "keep_float": list(keep_float)}
    recipe = fine_tuning_recipe(run, out, model, overrides, _PART)
    if recipe.taps:
        raise RecipeError(
            f"{run} learnt by losses that read its taps {recipe.taps}, which a recorded network has not.\n"
            "  Fix: --set 'losses=[{kind: kl_divergence}]', or other losses on logits"
        )
    return recipe


def train_quantized(
    run: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    keep_float: Sequence[str] = (),
    pixels: PixelType = "uint8",
    least_agreement: float = LEAST_INT8_AGREEMENT,
    resume: bool = False,
    overwrite: bool = False,
    latency: LatencyPlan | None = None,
) -> QuantizationAwareResult:
    """Train a run's network for int8 into the folder `out`, and export it to OUT/model.int8.onnx.

    It is `train` on the recipe of `quantization_aware_recipe`: checkpoints, resume, determinism and torchrun are as for
    any run; the first process exports. Raises as `train` and `export`.
    """
    recipe = quantization_aware_recipe(run, out, overrides, keep_float)
    stated = [text for text in overrides if text.startswith(STATED)]
    with joined() as ranks:
        trained = train(recipe, resume=resume)
        exported = ranks.by_first(
            lambda: export(
                out,
                Path(out) / "model.int8.onnx",
                stated,
                pixels=pixels,
                least_agreement=least_agreement,
                overwrite=overwrite or resume,
                latency=latency,
            )
        )
    return QuantizationAwareResult(str(run), trained, exported)
