"""Train a run's network for int8 on what the run learnt from, and export it: an ordinary run whose parent it names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.models import read_stored
from logitcache.shipping.export import ExportResult, export
from logitcache.shipping.metadata import Pixels
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.evaluation.evaluate import MODEL_FACTORY, read_run, require_known_source, stated_factory
from logitcache.student.runs.run_result import RunResult
from logitcache.student.runs.trained import EvaluationTransform, read_evaluation
from logitcache.student.training import AnyRecipe, train

_PART = 10
"""Training for int8 takes this part of the parent's epochs and learning rate, if these are not set."""
_SIDE = 256
_STATED = (MODEL_FACTORY, "validation", "dataset", "cache=", "trust=", "factories=")
"""Overrides that say where images lie, and what may be called."""


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
    parent = read_run(run, [text for text in overrides if text.startswith(_STATED)])
    require_known_source(run, parent, overrides)
    stored, recorded = read_stored(run / "model.json"), read_evaluation(run)
    size = stored.preprocessing.size
    if size is None:
        if recorded is None:
            raise RecipeError(f"{run} did not record how its images were evaluated. Fix: train it with this release")
        transform = EvaluationTransform(recorded.augmentations, stored.in_channels)
        _, height, width = transform(torch.zeros(stored.in_channels, _SIDE, _SIDE, dtype=torch.uint8)).shape
        size = height, width
    entries = parent.model_dump(mode="json", by_alias=True)
    entries["out"] = str(out)
    entries["model"] = {
        "kind": "quantized",
        "path": str(run),
        "input_size": list(size),
        "keep_float": list(keep_float),
        "factory": stated_factory(run, stored, overrides),
    }
    entries["epochs"] = max(1, parent.epochs // _PART // parent.views_per_image) * parent.views_per_image
    entries["optimizer"]["lr"] = parent.optimizer.lr / _PART
    entries["schedule"]["warmup_epochs"] = 0
    others = [text for text in overrides if not text.startswith(MODEL_FACTORY)]
    recipe = load_recipe(entries, type(parent), others)
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
    pixels: Pixels = "uint8",
    resume: bool = False,
    overwrite: bool = False,
    latency: LatencyPlan | None = None,
) -> QuantizationAwareResult:
    """Train a run's network for int8 into the folder `out`, and export it to OUT/model.int8.onnx.

    It is `train` on the recipe of `quantization_aware_recipe`: checkpoints, resume and determinism are those of any
    run. Raises as `train` and `export`.
    """
    recipe = quantization_aware_recipe(run, out, overrides, keep_float)
    trained = train(recipe, resume=resume)
    stated = [text for text in overrides if text.startswith(_STATED)]
    file = Path(out) / "model.int8.onnx"
    exported = export(out, file, stated, pixels=pixels, overwrite=overwrite or resume, latency=latency)
    return QuantizationAwareResult(str(run), trained, exported)
