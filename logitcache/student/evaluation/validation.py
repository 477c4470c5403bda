"""Run a model over validation images, and compare it with the teacher if a cache has its answers."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.cache.cache import Cache, open_uncompared
from logitcache.cache.format.manifest import LOGITS
from logitcache.cache.pairs.record import Pairing
from logitcache.errors import MismatchError, RecipeError
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import Precision, autocast
from logitcache.runtime.stopping import StopFlag
from logitcache.student.compatibility import require_labels
from logitcache.student.distributed.ranks import ALONE, Ranks
from logitcache.student.evaluation.class_names import mapped_labels, require_same_order
from logitcache.student.evaluation.multi_label import THRESHOLD, MultiLabelMeasures, MultiLabelTally
from logitcache.student.evaluation.single_label import Measures, Tally
from logitcache.student.evaluation.validation_recipe import Validation
from logitcache.student.lesson import begun_with, num_grown, pairing_of, share_held_out, views_of
from logitcache.student.losses import Loss
from logitcache.student.training_recipes import StudentRecipe, TrainingRecipe
from logitcache.targets import Batch
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.base import fingerprint, is_multi_label
from logitcache.views.epochs import EpochLoader, TargetsOf, no_targets
from logitcache.views.keys import Ints, ViewKey
from logitcache.views.order import held_out, share_of
from logitcache.views.spec import Views, ViewSpec
from logitcache.views.view_sizes import require_one_size

NUM_SAMPLES = 8
_MEASURED_ON = {"validation", "verify", "drift_limits", "factories", "trust", "num_workers"}
"""The entries of a recipe that decide how images to measure on are read."""

AnyTally = Tally | MultiLabelTally
AnyMeasures = Measures | MultiLabelMeasures


class Validator:
    """Images to measure on, in order, with the teacher's answers if they are known.

    `labels` [N], if given, replace the images' own: those of a data set of other classes, in the model's classes.
    Images whose label is -1 there are left out. `images` [N] are the indices of those to measure on, by default all.
    `threshold` is the probability above which answers to images of any number of classes are yes. With a `pairing` the
    images are paired with those that the teacher answered.
    """

    def __init__(
        self,
        views: Views,
        cache: Cache | None,
        batch_size: int,
        num_workers: int | Literal["auto"],
        labels: NDArray[np.int64] | None = None,
        threshold: float = THRESHOLD,
        images: Ints | None = None,
        pairing: Pairing | None = None,
    ) -> None:
        targets_of: TargetsOf = no_targets if cache is None else cache.rows
        self.cache, self._pairing = cache, pairing
        self.augmentations = views.spec.augmentations if pairing is None else ()
        self.views, self._labels = views, labels
        self.class_names = views.dataset.class_names if labels is None else None
        self.is_multi_label = is_multi_label(views.dataset.labels)
        several = functools.partial(MultiLabelTally.of, threshold=threshold)
        self._tally: Callable[..., AnyTally] = several if self.is_multi_label else Tally.of
        self._loader = EpochLoader(
            views, targets_of, batch_size=batch_size, num_workers=num_workers, rank=0, world_size=1
        )
        chosen = range(len(views.dataset.ids)) if images is None else images.tolist()
        self._indices = chosen if labels is None else [index for index in chosen if labels[index] >= 0]
        own = views.dataset.labels if labels is None else labels
        self.is_labelled = bool((own[self._indices] >= 0).any())
        self.num_images = len(self._indices)
        self.num_left_out = len(chosen) - self.num_images

    def identity(self) -> dict[str, Any]:
        """Return what identifies the images and the answers; reads the images that are not remembered."""
        if self.cache is not None:
            manifest, further = self.cache.manifest, num_grown(self.cache)
            further = further if self._pairing is None else further | self._pairing.identity()
            return {"cache": manifest.restricted(1, manifest.targets).content_digest(), **further}
        return {"dataset": fingerprint(self.views.dataset).model_dump(mode="json")}

    def sample(self) -> Tensor:
        """Render the first few images, uint8 [B, C, H, W]."""
        return self.views.__getitems__(self._keys(0, NUM_SAMPLES))

    def _keys(self, start: int, count: int) -> list[ViewKey]:
        return [ViewKey(0, index) for index in self._indices[start : start + count]]

    def batches(
        self, device: torch.device, what: str, ranks: Ranks = ALONE, some: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yield all images, or `some` of them by position, in batches on a device, in order.

        To each of several ranks its share of the batches.
        """
        size = self._loader.batch_size
        every = self._keys(0, self.num_images)
        chosen = every if some is None else [every[position] for position in some]
        keys = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        own = share_of(keys, ranks.rank, ranks.size)
        for batch in track(self._loader.batches(own), what, len(own), "batches"):
            if self._labels is not None:
                batch = replace(batch, labels=torch.from_numpy(self._labels[batch.keys[:, 1].numpy()]))
            yield batch.to(device)

    def each_batch(
        self,
        take: Callable[[Batch], object],
        device: torch.device,
        ranks: Ranks = ALONE,
        stop: StopFlag | None = None,
    ) -> None:
        """Give every batch to a function; raise Stopped on all ranks once the flag of any is set."""
        for batch in self.batches(device, "validate", ranks):
            if stop:
                break
            take(batch)
        if stop is not None and (agreed := ranks.agreed(stop)):
            raise agreed.stopped("stopped while measuring; the same command with --resume continues")

    def tally(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision = "float32",
        ranks: Ranks = ALONE,
        stop: StopFlag | None = None,
    ) -> AnyTally:
        """Run a model (uint8 pixels in, logits out) over all images and count.

        Of several ranks each counts its share of the batches, and all get the sum. Raises Stopped on all of them once
        the flag of any is set.
        """
        counted = Counted(self, model, device, precision)
        self.each_batch(counted.add, device, ranks, stop)
        return counted.total(ranks)

    def counts(self, logits: Tensor, batch: Batch) -> AnyTally:
        """Count what a model answers to one batch."""
        return self._tally(logits, batch.labels, batch.teachers)

    def require_labels(self, losses: Sequence[Loss]) -> None:
        """Raise RecipeError if losses ask for labels of another kind than those of the images."""
        require_labels(losses, self.views.dataset.labels, "validation: ")

    def require_order(self, names: Sequence[str] | None) -> None:
        """Raise MismatchError if the images are of a model's classes, of these names, in another order."""
        if self._labels is None:
            require_same_order(names, self.views.dataset)


class Counted:
    """What one model answers to a validator's images, added up batch by batch."""

    def __init__(self, validator: Validator, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self._validator, self._model = validator, model
        self._device, self._precision = device, precision
        self._own: AnyTally | None = None

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model on a batch."""
        self._model.eval()
        with autocast(self._device, self._precision):
            logits = self._model(batch.images).float()
        found = self._validator.counts(logits, batch)
        self._own = found if self._own is None else operator.add(self._own, found)

    def total(self, ranks: Ranks = ALONE) -> AnyTally:
        """Return the sum over all batches, and over all ranks."""
        return functools.reduce(operator.add, (part for part in ranks.gathered(self._own) if part is not None))


def open_validator(
    recipe: TrainingRecipe,
    num_classes: int,
    opened: dict[str, Validator] | None = None,
    learned: Views | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Validator | None:
    """Open the images to measure on; raises MismatchError when they, or the cache's teachers, have other classes.

    `opened`: validators that recipes of the same images share; a new one is added. `learned`: the open views that the
    model learns from. `begun`: the identity of the images that a run which continues began with.
    """
    if recipe.validation is None:
        return None
    learned_from = set() if share_held_out(recipe) is None else {"cache", "dataset"}
    key = f"{num_classes} {recipe.model_dump_json(include=_MEASURED_ON | learned_from)} {begun}"
    opened = {} if opened is None else opened
    if key not in opened:
        opened[key] = _open(recipe, num_classes, learned, begun or {})
    opened[key].require_labels(recipe.losses)
    if learned is not None:
        opened[key].require_order(learned.dataset.class_names)
    return opened[key]


def _open(recipe: TrainingRecipe, num_classes: int, learned: Views | None, begun: Mapping[str, Any]) -> Validator:
    validation = recipe.validation
    assert validation is not None
    location, dataset = validation.cache, validation.dataset
    if validation.split is not None:
        assert isinstance(recipe, StudentRecipe), "others have no cache"
        location, dataset = recipe.cache, recipe.dataset
    cache = None if location is None else only_logits(begun_with(open_uncompared(location), begun))
    pairing = None if cache is None else _pairing(recipe, validation, cache)
    if cache is None:
        views = Views(open_dataset(validation.dataset), ViewSpec(augmentations=validation.augmentations))
        require_one_size(views)
    else:
        is_open = validation.split is not None
        views = learned if is_open and learned is not None else views_of(cache, dataset, recipe, pairing=pairing)
        if views.spec.mixing:
            raise MismatchError(
                f"validation: {location} holds mixed images, which have no one label. "
                "Fix: a cache of the images as they are"
            )
        if views.spec.is_random:
            lower = "what is measured on them is lower than on the images as they are"
            logger.info(f"{location} holds randomly augmented images: {lower}")
    require_labels(recipe.losses, views.dataset.labels, "validation: ")
    class_map = validation.class_map
    labels = None if class_map is None else mapped_labels(views.dataset, class_map, num_classes)
    found = {"the images": views.dataset.num_classes if labels is None else num_classes}
    if cache is not None:
        found |= {f"teacher {name!r}": entry.num_classes for name, entry in cache.manifest.teachers.items()}
    for who, count in found.items():
        if count not in (None, num_classes):
            raise MismatchError(
                f"validation: {who} has {count} classes, the model {num_classes}. Fix: validate on the same classes, "
                "or map the classes by validation.class_map"
            )
    images = None if pairing is None else pairing.matched
    if validation.split is not None:
        held = np.flatnonzero(held_out(len(views.dataset.ids), validation.split))
        images = held if images is None else np.intersect1d(held, images)
        if not len(images):
            raise RecipeError(f"validation.split {validation.split:g} holds out no image. Fix: a larger share")
    size, workers = validation.batch_size, recipe.num_workers
    return Validator(views, cache, size, workers, labels, validation.threshold, images, pairing)


def _pairing(recipe: TrainingRecipe, validation: Validation, cache: Cache) -> Pairing | None:
    """Read the pairing of the images to measure on; raise RecipeError if a student of one would see the teacher's."""
    if validation.pairing is not None:
        return cache.pairing(validation.pairing)
    own = pairing_of(recipe, cache) if isinstance(recipe, StudentRecipe) and validation.split is not None else None
    if own is None and isinstance(recipe, StudentRecipe) and recipe.pairing is not None:
        raise RecipeError(
            f"validation: {cache.location} is of images that the teacher saw, and the student learns from paired ones. "
            "Fix: validation.pairing, for this cache, or validation.dataset in its place"
        )
    return own


def only_logits(cache: Cache) -> Cache:
    """Leave out all but the teachers' logits: nothing else is read then."""
    return cache.only({name: [LOGITS] for name, entry in cache.manifest.teachers.items() if entry.logits is not None})
