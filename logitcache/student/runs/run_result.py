"""The result of a run: its metrics, and the weights of its last or best epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from safetensors.torch import save
from torch import Tensor

from logitcache.classifier import Preprocessing
from logitcache.errors import RecipeError
from logitcache.models import StoredModel, load_weights, plain, read_state, save_model, save_weights
from logitcache.runtime.console import logger
from logitcache.store.files import write_atomically
from logitcache.store.safe_files import read_bounded, require_bounded
from logitcache.student.evaluation.validation import Validator
from logitcache.student.learner import Learner
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.state_shapes import most_state_bytes
from logitcache.student.runs.trained import Evaluation, save_evaluation
from logitcache.student.training_recipes import TrainingRecipe

_UNLIKE = 1.5
"""Ratio of image sizes above which a network rarely generalises from one to the other."""


@dataclass(frozen=True)
class RunResult:
    """Metrics of a finished run; accuracies are fractions of the validation images, None without validation.

    Multi-label images have mean average precision and F1 in place of top-1 and top-5.
    """

    out: str
    epochs: int
    steps: int
    images: int
    seconds: float
    num_parameters: int
    loss: float
    top1: float | None
    top5: float | None
    best_top1: float | None
    agreement: float | None
    teacher_passes: int
    mean_ap: float | None = None
    f1_macro: float | None = None
    f1_micro: float | None = None
    best_mean_ap: float | None = None


def require_measurable(
    recipe: TrainingRecipe,
    validator: Validator | None,
    sample: Tensor | None,
    learned: Sequence[int],
    preprocessing: Preprocessing,
) -> None:
    """Check that validation can select the best epoch, and that its images fit the training images.

    Raises RecipeError if `best` is to be kept and no validation image has a label, or if validation images have
    another size than the training images `learned` [C, H, W] and the recipe does not state it. Warns of a stated size
    that differs much.
    """
    images = recipe.validation
    if images is not None and sample is not None and images.dataset is not None and images.cache is None:
        (height, width), size = learned[-2:], tuple(sample.shape[-2:])
        is_free, stated = preprocessing.size is None, "augmentations" in images.model_fields_set
        ratio = max(size[0] / height, size[1] / width, height / size[0], width / size[1])
        if is_free and stated and ratio > _UNLIKE:
            logger.warning(
                f"the model learns from {height} × {width} pixels and is measured on {size[0]} × {size[1]}, which it "
                "is not resized to: accuracy may be far lower. Fix: preprocessing.input_size, or validation "
                "augmentations that end near the size that it learns from"
            )
        if is_free and not stated and size != (height, width):
            raise RecipeError(
                f"validation: the images are {size[0]} × {size[1]} pixels, those that the model learns from {height} × "
                f"{width}. Fix: validation.augmentations: [{{kind: resize, size: [{height}, {width}]}}], or [] to "
                "measure on the images as they are"
            )
    if recipe.keep == "best" and (validator is None or not validator.is_labelled):
        raise RecipeError("keep: best needs labelled images to measure on. Fix: keep: last, or other validation images")


def keep_if_best(learner: Learner, run: RunDirectory, row: dict[str, Any]) -> None:
    """Write the weights to a file of their own if this epoch is the best so far."""
    if best_epoch([*run.rows, row]) == row["epoch"]:
        learner.ranks.by_first(lambda: save_weights(run.best, learner.measured.module))


def extend(recipe: TrainingRecipe, run: RunDirectory, before: int, step: int, steps: int) -> None:
    """Extend a finished run of `before` epochs to the epochs of the recipe; log the effect on its schedules.

    `step` is the next step, `steps` the number of steps of an epoch.
    """
    if recipe.keep == "best":
        run.ranks.by_first(lambda: _restore_best(run))
    old, new = (recipe.optimizer.lr * recipe.schedule.factor(step, steps, epochs) for epochs in (before, recipe.epochs))
    logger.info(
        f"{run.path} goes on to {recipe.epochs} epochs, it was begun for {before}: from step {step} on, its schedules "
        f"are those of a run of {recipe.epochs} (learning rate {new:.3g}, was to be {old:.3g}). The steps before were "
        "trained by the shorter schedules, so a run that begins with as many epochs ends with other weights"
    )


def _restore_best(run: RunDirectory) -> None:
    """Restore the kept weights of a finished run, so that the added epochs are compared with them."""
    kept = run.path / "weights.safetensors"
    if kept.exists() and not run.best.exists():
        with run.reading(kept):
            write_atomically(run.best, read_bounded(kept, kept.stat().st_size))


def _quality(row: dict[str, Any]) -> float | None:
    return cast(float | None, row.get("val_top1", row.get("val_mean_ap")))


def best_epoch(rows: list[dict[str, Any]]) -> int:
    """Return the best epoch, the first of several."""
    measured = [row for row in rows if _quality(row) is not None]
    return int(max(measured, key=lambda row: (_quality(row), -row["epoch"]))["epoch"])


def save_kept(
    recipe: TrainingRecipe, run: RunDirectory, learner: Learner, stored: StoredModel, evaluation: Evaluation
) -> None:
    """Write the weights that the recipe keeps, and the files that are needed to use them."""
    classifier = learner.measured
    save_evaluation(run.path, evaluation)
    if recipe.keep == "best":
        with run.reading(run.best):
            require_bounded(run.best, most_state_bytes(classifier.state_dict()))
            load_weights(classifier.module, read_state(run.best), str(run.best))
    module = classifier.module if recipe.model is None else plain(recipe.model, classifier.module)
    save_model(run.path, module, stored)
    # What the losses trained beside the model, by the number of the loss.
    if adapters := {name: parameter.detach().cpu() for name, parameter in learner.adapters.named_parameters()}:
        write_atomically(run.path / "adapters.safetensors", save(adapters))
