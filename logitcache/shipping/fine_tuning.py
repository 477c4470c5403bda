"""Train a run's network further, changed: the run's own recipe with another entry for the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.models import read_stored
from logitcache.student.evaluation.open_run import MODEL_FACTORY, read_run, require_known_source, stated_factory
from logitcache.student.runs.trained import EvaluationTransform, read_evaluation
from logitcache.student.training import AnyRecipe

STATED = (MODEL_FACTORY, "validation", "dataset", "cache=", "trust=", "factories=")
"""Overrides that say where images lie, and what may be called."""
_SIDE = 256


def fine_tuning_recipe(
    run: Path, out: str | Path, model: Mapping[str, object], overrides: Sequence[str] = (), part: int = 1
) -> AnyRecipe:
    """Return the recipe of a run with another model in `out`: the same data, losses and all else.

    `model` is the entry without the run's path. Epochs, at least one, and learning rate are a part of the run's own,
    unless `overrides` set them. Raises RecipeError, and RefusedError for places that only the run's file names.
    """
    if own := [text for text in overrides if text.startswith(("model", "out=")) and not text.startswith(MODEL_FACTORY)]:
        raise RecipeError(f"--set {own[0]}: the model is that of {run}, and the folder an argument. Fix: leave it out")
    parent = read_run(run, [text for text in overrides if text.startswith(STATED)])
    require_known_source(run, parent, overrides)
    entries = parent.model_dump(mode="json", by_alias=True)
    factory = stated_factory(run, read_stored(run / "model.json"), overrides)
    entries["out"] = str(out)
    entries["model"] = dict(model) | {"path": str(run), "factory": factory, "trust": list(parent.trust)}
    if part > 1:
        entries["epochs"] = max(1, parent.epochs // part // parent.views_per_image) * parent.views_per_image
        entries["optimizer"]["lr"] = parent.optimizer.lr / part
        entries["schedule"]["warmup_epochs"] = 0
    others = [text for text in overrides if not text.startswith(MODEL_FACTORY)]
    return load_recipe(entries, type(parent), others)


def evaluated_size(run: Path) -> tuple[int, int]:
    """Return the height and width of the images that a run's network takes. Raises RecipeError if it is unrecorded."""
    stored, recorded = read_stored(run / "model.json"), read_evaluation(run)
    if stored.preprocessing.size is not None:
        return stored.preprocessing.size
    if recorded is None:
        raise RecipeError(f"{run} did not record how its images were evaluated. Fix: train it with this release")
    transform = EvaluationTransform(recorded.augmentations, stored.in_channels)
    _, height, width = transform(torch.zeros(stored.in_channels, _SIDE, _SIDE, dtype=torch.uint8)).shape
    return height, width
