"""How alike student and teacher represent the images: linear CKA of the student's taps and the teachers' features."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.cache.cache import Cache, open_cache
from logitcache.errors import RecipeError
from logitcache.logits import at_least_float32
from logitcache.models import Classifier
from logitcache.models.taps.taps import Tapped
from logitcache.reductions import pooled
from logitcache.runtime.device import autocast
from logitcache.student.build_model import decide_layouts
from logitcache.student.evaluation.validation import Validator
from logitcache.student.training_recipes import TrainingRecipe
from logitcache.targets import Batch
from logitcache.views.keys import ViewKey

KINDS = ("pooled", "maps")
"""Kinds of features that are vectors, or become such by the mean over places."""


@dataclass(frozen=True)
class TapSimilarity:
    """Linear CKA of what the student has at a tap and a teacher's feature, both as means over places; in [0, 1].

    None if one of them is the same for all images.
    """

    tap: str
    teacher: str
    feature: str
    cka: float | None


class LinearCKA:
    """Linear centred kernel alignment over batches: ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred X and Y, in float64.

    Kornblith et al., "Similarity of neural network representations revisited" (ICML 2019), equation 5 and below. Takes
    the memory of the products, (D + E)² numbers, however many rows there are.
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._origin = self._sums = self._products = torch.zeros(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows x [B, D] and y [B, E] of the same images."""
        rows = torch.cat([x.to("cpu", torch.float64), y.to("cpu", torch.float64)], dim=1)
        if not self._num_rows:
            # Taken out of all rows, as products of large means would cancel; what is constant becomes exactly 0.
            self._origin = rows[0].clone()
            self._num_x = x.shape[1]
            self._sums, self._products = torch.zeros_like(self._origin), torch.zeros(2 * self._origin.shape).double()
        rows = rows - self._origin
        self._num_rows += len(rows)
        self._sums += rows.sum(dim=0)
        self._products += rows.T @ rows

    def value(self) -> float | None:
        """Return the similarity, in [0, 1]; None if x or y is constant."""
        centred = self._products - torch.outer(self._sums, self._sums) / self._num_rows
        x, y = centred[: self._num_x, : self._num_x], centred[self._num_x :, self._num_x :]
        norms = x.norm() * y.norm()
        return float(centred[: self._num_x, self._num_x :].square().sum() / norms) if norms > 0 else None


def compare_taps(
    recipe: TrainingRecipe, classifier: Classifier, validator: Validator, device: torch.device
) -> tuple[TapSimilarity, ...]:
    """Compare the recipe's taps with every pooled feature, or feature map, that the images' cache stores.

    Raises RecipeError for a tap that is not there, and as `layouts_of`.
    """
    taps, kept = tuple(dict.fromkeys([*recipe.measured_taps, *recipe.taps])), comparable_features(validator)
    if not taps or kept is None:
        return ()
    features = [(teacher, feature) for teacher in kept.manifest.teachers for feature in kept.features(teacher)]
    found = {(tap, *names): LinearCKA() for tap in taps for names in features}
    for batch, _, caught in tapped_batches(recipe, classifier, validator, device, taps, "compare features"):
        theirs = pooled_features(kept, batch)
        for (tap, teacher, feature), similarity in found.items():
            similarity.add(caught[tap], theirs[teacher, feature])
    return tuple(TapSimilarity(*names, similarity.value()) for names, similarity in found.items())


@torch.no_grad()
def tapped_batches(
    recipe: TrainingRecipe,
    classifier: Classifier,
    validator: Validator,
    device: torch.device,
    taps: Sequence[str],
    what: str,
    some: Sequence[int] | None = None,
) -> Iterator[tuple[Batch, Tensor, dict[str, Tensor]]]:
    """Yield the batches of a validator, the student's logits, and what it has at its taps, as means over places.

    `some` are the images to take, by position. Raises RecipeError for a tap that is not there, and as `layouts_of`.
    """
    layouts = decide_layouts(recipe, classifier, validator.sample()[:1].to(device), taps)
    with closing(Tapped(classifier.eval(), classifier.module, taps, "the student", layouts)) as tapped:
        for batch in validator.batches(device, what, some=some):
            with autocast(device, recipe.precision):
                logits, caught = tapped(batch.images)
            yield batch, logits, {tap: pooled(values) for tap, values in caught.items()}


def pooled_features(cache: Cache, batch: Batch) -> dict[tuple[str, str], Tensor]:
    """Return what a cache stores of the images of a batch, as means over places, by teacher and feature."""
    return {
        (teacher, feature): pooled(at_least_float32(values))
        for teacher, targets in cache.rows([ViewKey(*key) for key in batch.keys.tolist()]).items()
        for feature, values in targets.features.items()
    }


def require_features(validator: Validator) -> None:
    """Raise RecipeError if taps are named and no cache has features to compare them with."""
    if comparable_features(validator) is None:
        raise RecipeError(
            "validation.taps names modules to compare with the teachers' features, but what is measured on keeps none. "
            "Fix: validation.cache, precomputed with teachers.NAME.features of kind pooled or maps"
        )


def comparable_features(validator: Validator) -> Cache | None:
    """Return the images' cache with nothing but such features as can be compared; None if there are none."""
    return None if validator.cache is None else only_comparable(open_cache(validator.cache.location))


def only_comparable(cache: Cache) -> Cache | None:
    """Return a cache with nothing but the features that are vectors, or become such; None if there are none."""
    comparable = {
        teacher: [name for name, shape in cache.features(teacher).items() if shape.kind in KINDS]
        for teacher in cache.manifest.teachers
    }
    comparable = {teacher: names for teacher, names in comparable.items() if names}
    return cache.only(comparable) if comparable else None
