"""Measure a model on untouched images, beside the teacher where a cache has its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.cache.reader import Cache, open_cache
from logitcache.console import track
from logitcache.device import Precision, autocast, own_randomness, resolve_device
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import Classifier, Custom, StoredModel, load_model, read_stored, resolve_preprocessing
from logitcache.recipe import load_recipe, read_recipe
from logitcache.stopping import StopFlag
from logitcache.student.recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.sources import views_of
from logitcache.targets import Targets, log_probs
from logitcache.views.augmentations.foreign import locks
from logitcache.views.datasets import Custom as CustomImages
from logitcache.views.datasets import fingerprint, open_dataset
from logitcache.views.epochs import EpochLoader, TargetsOf, no_targets
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec, require_one_size

NUM_SAMPLES = 8
MODEL_FACTORY = "model.factory="


@dataclass(frozen=True)
class Measures:
    """Fractions of the labelled images (top-k) or of all (agreement); KL(teacher ‖ student) in nats at T = 1.

    None where there are no labels or no teacher. Several teachers count as the mean of their probabilities.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    teacher_top1: float | None


@dataclass(frozen=True)
class EvaluationResult:
    """A finished run, measured; `retention` is the student's top-1 over its teacher's."""

    run: str
    images: int
    num_parameters: int
    measures: Measures
    retention: float | None


class Validator:
    """Images to measure on, in order, with the teacher's answers where they are known."""

    def __init__(self, views: Views, cache: Cache | None, batch_size: int, num_workers: int) -> None:
        targets_of: TargetsOf = no_targets if cache is None else cache.rows
        self._views, self._cache = views, cache
        self._loader = EpochLoader(views, targets_of, batch_size=batch_size, num_workers=num_workers)
        self.num_images = len(views.dataset.ids)

    def identity(self) -> dict[str, Any]:
        """Say which images and whose answers these are; reads the images that are not remembered."""
        if self._cache is not None:
            manifest = self._cache.manifest
            return {"cache": manifest.restricted(1, list(manifest.teachers)).content_digest()}
        return {"dataset": fingerprint(self._views.dataset).model_dump(mode="json")}

    def sample(self) -> Tensor:
        """Render the first few images, uint8 [B, C, H, W]."""
        return self._views.__getitems__(self._keys(0, NUM_SAMPLES))

    def _keys(self, start: int, count: int) -> list[ViewKey]:
        return [ViewKey(0, index) for index in range(start, min(start + count, self.num_images))]

    @torch.no_grad()
    def measure(
        self, model: nn.Module, device: torch.device, precision: Precision = "float32", stop: StopFlag | None = None
    ) -> Measures:
        """Run a model (uint8 pixels in, logits out) over all images; raises Stopped when the flag is set."""
        model.eval()
        totals = torch.zeros(7, dtype=torch.float64)
        size = self._loader.batch_size
        batches = self._loader.batches(self._keys(start, size) for start in range(0, self.num_images, size))
        for batch in track(batches, "validate", len(self._loader), "batches"):
            if stop:
                raise stop.stopped("stopped while measuring; the same command with --resume continues")
            batch = batch.to(device)
            with autocast(device, precision):
                logits = model(batch.images).float()
            totals += _counts(logits, batch.labels, batch.teachers).cpu()
        labelled, top1, top5, taught, agreement, kl, teacher_top1 = totals.tolist()
        return Measures(
            top1=top1 / labelled if labelled else None,
            top5=top5 / labelled if labelled else None,
            agreement=agreement / taught if taught else None,
            kl=kl / taught if taught else None,
            teacher_top1=teacher_top1 / labelled if labelled and taught else None,
        )


def _counts(logits: Tensor, labels: Tensor, teachers: Mapping[str, Targets]) -> Tensor:
    """Count labelled rows, top-1, top-5, taught rows, agreement, summed KL and the teacher's top-1."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & (labels[:, None] >= 0)
    counts = [(labels >= 0).sum(), hits[:, 0].sum(), hits.any(dim=1).sum()]
    if teachers:
        p = torch.stack([log_probs(targets.logits).exp() for targets in teachers.values()]).mean(dim=0)
        best = p.argmax(dim=1)
        kl = (torch.xlogy(p, p) - p * log_probs(logits)).sum()
        counts += [torch.tensor(len(logits)), (best == ranked[:, 0]).sum(), kl, (best == labels).sum()]
    else:
        counts += [torch.tensor(0)] * 4
    return torch.stack([count.to("cpu", torch.float64) for count in counts])


def open_validator(recipe: TrainingRecipe, num_classes: int) -> Validator | None:
    """Open the images to measure on; raises MismatchError when they, or the cache's teachers, have other classes."""
    validation = recipe.validation
    if validation is None:
        return None
    cache = None if validation.cache is None else open_cache(validation.cache)
    if cache is None:
        views = Views(open_dataset(validation.dataset), ViewSpec(augmentations=validation.augmentations))
        require_one_size(views)
    else:
        views = views_of(cache, validation.dataset, recipe)
        if views.spec.mixing:
            raise MismatchError(
                f"validation: {validation.cache} holds mixed images, which have no one label. "
                "Fix: a cache of the images as they are"
            )
    found = {"the images": views.dataset.num_classes}
    if cache is not None:
        found |= {f"teacher {name!r}": entry.num_classes for name, entry in cache.manifest.teachers.items()}
    for who, count in found.items():
        if count not in (None, num_classes):
            raise MismatchError(
                f"validation: {who} has {count} classes, the model {num_classes}. Fix: validate on the same classes"
            )
    return Validator(views, cache, validation.batch_size, recipe.num_workers)


def evaluate(run: Path, overrides: Sequence[str] = ()) -> EvaluationResult:
    """Measure a finished run on its recipe's validation images, or on others by `overrides` (validation.cache=…).

    What the run's files name as a factory is not called: the user says it again.
    """
    recipe = _read_recipe(run, overrides)
    if recipe.validation is None:
        raise RecipeError(
            f"{run} names no images to measure on. Fix: --set validation.dataset=… or --set validation.cache=…"
        )
    stored = read_stored(run / "model.json")
    device = resolve_device(recipe.device)
    with own_randomness(device, recipe.seed):  # a network draws its first weights, which are then replaced
        built = load_model(run, _stated_factory(run, stored, overrides))
    classifier = Classifier(built.module, resolve_preprocessing(built, None, who=str(run)))
    validator = open_validator(recipe, stored.num_classes)
    assert validator is not None
    measures = validator.measure(classifier.to(device), device, recipe.precision)
    retention = measures.top1 / measures.teacher_top1 if measures.top1 is not None and measures.teacher_top1 else None
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    return EvaluationResult(str(run), validator.num_images, parameters, measures, retention)


def _read_recipe(run: Path, overrides: Sequence[str]) -> StudentRecipe | TeacherRecipe:
    """Read a run's recipe, but for its model, which `model.json` tells; `overrides` change it."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(
            f"{run} is no run: it has no recipe.yaml. Fix: name the `out:` directory of a finished training"
        )
    others = [text for text in overrides if not text.startswith(MODEL_FACTORY)]
    recipe: StudentRecipe | TeacherRecipe
    if "cache" in read_recipe(path):
        recipe = load_recipe(path, StudentRecipe, others)
    else:
        recipe = load_recipe(path, TeacherRecipe, others)
    _require_stated(recipe, path, others)
    said = any(text.startswith("factories=") for text in others)
    return recipe if said else recipe.model_copy(update={"factories": ()})


def _require_stated(recipe: TrainingRecipe, path: Path, overrides: Sequence[str]) -> None:
    """Raise RecipeError where a run's file, and not the user, names a factory to call."""
    if recipe.validation is None:
        return
    images = recipe.validation.dataset
    named = {"validation.dataset.factory": images.factory} if isinstance(images, CustomImages) else {}
    for number, augmentation in enumerate(recipe.validation.augmentations):
        for lock in locks([augmentation]):
            named |= {} if lock.factory is None else {f"validation.augmentations.{number}.factory": lock.factory}
    for key, factory in named.items():
        if not any(text.partition("=")[0] in _above(key) for text in overrides):
            raise RecipeError(
                f"{path} names the factory '{factory}', and what a file names is never called.\n"
                f"  Fix: if you trust it, --set {key}={factory}"
            )


def _above(key: str) -> set[str]:
    """Return a key and those that hold it: setting any of them says what it is."""
    parts = key.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _stated_factory(run: Path, stored: StoredModel, overrides: Sequence[str]) -> str | None:
    stated = [text.removeprefix(MODEL_FACTORY) for text in overrides if text.startswith(MODEL_FACTORY)]
    if isinstance(stored.model, Custom) and not stated:
        raise RecipeError(
            f"{run} is a model of the factory '{stored.model.factory}', and what a file names is never called.\n"
            f"  Fix: if you trust it, --set {MODEL_FACTORY}{stored.model.factory}"
        )
    return stated[-1] if stated else None
