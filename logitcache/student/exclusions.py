"""Entries of a training recipe that exclude one another."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitcache.student.training_recipes import TrainingRecipe


def exclusions(recipe: "TrainingRecipe") -> Iterator[str]:
    """Yield why entries exclude one another."""
    if recipe.keep == "best" and recipe.validation is None:
        yield "keep: best keeps the weights that measure best, and nothing is measured: add validation"
    coupled = [loss.kind for loss in recipe.losses if not loss.by_row]
    if coupled and recipe.micro_batches > 1:
        yield f"{coupled} compare the rows of a whole batch with one another: leave out micro_batches"
    if few := [loss.kind for loss in recipe.losses if recipe.batch_size < loss.min_rows]:
        largest = max(loss.min_rows for loss in recipe.losses)
        yield f"{few} compare the rows of a batch with one another: make batch_size {largest} or more"
    within = [loss.kind for loss in recipe.losses if loss.differentiates]
    if within and recipe.compile:
        yield f"{within} take gradients inside the model, which a compiled one hides: leave out compile"
    if within and recipe.sync_batch_norm:
        yield (
            f"{within} take gradients inside the model, and torch.nn.SyncBatchNorm has none of these: leave out "
            "sync_batch_norm"
        )
    if recipe.epochs % recipe.views_per_image:
        yield (
            f"{recipe.epochs} epochs with views_per_image {recipe.views_per_image} use some images more often than "
            f"others: make epochs a multiple of {recipe.views_per_image}"
        )
