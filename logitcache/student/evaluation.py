"""Measure a model on untouched images, beside the teacher where a cache has its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from logitcache.cache.reader import open_cache
from logitcache.console import track
from logitcache.device import Precision, autocast, resolve_device
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import Classifier, load_model, read_stored, resolve_preprocessing
from logitcache.recipe import load_recipe
from logitcache.student.recipes import StudentRecipe, TeacherRecipe, Validation
from logitcache.targets import Targets, log_probs
from logitcache.views.datasets import open_dataset
from logitcache.views.epochs import EpochLoader, TargetsOf, no_targets
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec


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

    def __init__(self, views: Views, targets_of: TargetsOf, batch_size: int, num_workers: int) -> None:
        self._loader = EpochLoader(views, targets_of, batch_size=batch_size, num_workers=num_workers)
        count = len(views.dataset.ids)
        self._batches = [
            [ViewKey(0, i) for i in range(s, min(s + batch_size, count))] for s in range(0, count, batch_size)
        ]
        self.num_images = count

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device, precision: Precision = "float32") -> Measures:
        """Run a model (uint8 pixels in, logits out) over all images."""
        model.eval()
        totals = torch.zeros(7, dtype=torch.float64)
        for batch in track(self._loader.batches(self._batches), "validate", len(self._batches), "batches"):
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


def open_validator(validation: Validation | None, num_classes: int, num_workers: int) -> Validator | None:
    """Open the images to measure on; raises MismatchError when they are of another number of classes."""
    if validation is None:
        return None
    targets_of: TargetsOf = no_targets
    if validation.cache is not None:
        cache = open_cache(validation.cache)
        views, targets_of = cache.views(validation.dataset), cache.rows
    else:
        views = Views(open_dataset(validation.dataset), ViewSpec(augmentations=validation.augmentations))
    found = views.dataset.num_classes
    if found not in (None, num_classes):
        raise MismatchError(
            f"validation has {found} classes, the model {num_classes}. Fix: validate on images of the same classes"
        )
    return Validator(views, targets_of, validation.batch_size, num_workers)


def evaluate(run: Path, overrides: Sequence[str] = ()) -> EvaluationResult:
    """Measure a finished run on its recipe's validation images, or on others by `overrides` (validation.cache=…)."""
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(
            f"{run} is no run: it has no recipe.yaml. Fix: name the `out:` directory of a finished training"
        )
    kind = StudentRecipe if "cache" in yaml.safe_load((run / "recipe.yaml").read_text()) else TeacherRecipe
    recipe = load_recipe(run / "recipe.yaml", kind, overrides)
    if recipe.validation is None:
        raise RecipeError(
            f"{run} names no images to measure on. Fix: --set validation.dataset=… or --set validation.cache=…"
        )
    stated = [text.removeprefix("model.factory=") for text in overrides if text.startswith("model.factory=")]
    built = load_model(run, stated[-1] if stated else None)
    classifier = Classifier(built.module, resolve_preprocessing(built, None, who=str(run)))
    device = resolve_device(recipe.device)
    num_classes = read_stored(run / "model.json").num_classes
    validator = open_validator(recipe.validation, num_classes, recipe.num_workers)
    assert validator is not None
    measures = validator.measure(classifier.to(device), device, recipe.precision)
    retention = measures.top1 / measures.teacher_top1 if measures.top1 is not None and measures.teacher_top1 else None
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    return EvaluationResult(str(run), validator.num_images, parameters, measures, retention)
