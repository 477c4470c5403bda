"""Measure runs for a report: by class, by confidence, against the teacher, and how alike their representations are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import open_uncompared
from logitcache.errors import LogitCacheError
from logitcache.logits import log_probs
from logitcache.runtime.device import autocast
from logitcache.student.evaluation.alignment import comparable_features, pooled_features, tapped_batches
from logitcache.student.evaluation.cost import Contender, LatencyPlan, latencies
from logitcache.student.evaluation.open_run import OpenedRun, open_run, require_known_images, require_known_source
from logitcache.student.evaluation.single_label import Tally
from logitcache.student.evaluation.validation import Validator, only_logits
from logitcache.student.lesson import pairing_of, views_of
from logitcache.student.training_recipes import StudentRecipe
from logitcache.views.datasets.arranged import present

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Beside:
    """Answers of a run and of its teachers to the same images, [n, D] each, by what gave them.

    `logits` are log-probabilities, `features` what taps and stored features are as means over places. `source` is the
    cache that the teachers' come from; `labels` [n], -1 for none.
    """

    source: str
    labels: NDArray[np.int64]
    student: Matrix
    teachers: Mapping[str, Matrix]
    taps: Mapping[str, Matrix]
    features: Mapping[str, Matrix]

    @property
    def is_finite(self) -> bool:
        """Whether all answers are finite: PCA and t-SNE take no others."""
        every = (self.student, *self.teachers.values(), *self.taps.values(), *self.features.values())
        return all(bool(np.isfinite(answers).all()) for answers in every)


@dataclass(frozen=True)
class MeasuredRun:
    """A run over its validation images: counts of the student and of each teacher; `note`: what could not be measured.

    Images of any number of classes are counted by `evaluate` alone.
    """

    name: str
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    beside: Beside | None = None
    latency_ms: float | None = None
    note: str = ""


def measure_run(run: Path, name: str, overrides: Sequence[str], points: int, latency: bool) -> MeasuredRun:
    """Run a model over its validation images; of `points` images, the same for all, keep the answers."""
    try:
        opened = open_run(run, overrides)
        speed = _latency(opened) if latency else None
        if opened.validator.is_multi_label:
            return MeasuredRun(name, latency_ms=speed, note="images of any number of classes: see evaluate")
        tallies = _tallies(opened)
        beside, note = _beside(run, opened, points, overrides)
    except LogitCacheError as error:
        return MeasuredRun(name, note=str(error).splitlines()[0])
    return MeasuredRun(name, tallies, opened.validator.class_names, beside, speed, note)


@torch.no_grad()
def _tallies(opened: OpenedRun) -> dict[str, Tally]:
    """Count the student, "student", and each teacher."""
    found: dict[str, list[Tally]] = {}
    for batch in opened.validator.batches(opened.device, "measure"):
        with autocast(opened.device, opened.recipe.precision):
            logits = opened.classifier(batch.images).float()
        answers = {"student": logits} | {name: targets.log_probs() for name, targets in batch.teachers.items()}
        for name, answer in answers.items():
            teachers = batch.teachers if name == "student" else {}
            found.setdefault(name, []).append(Tally.of(answer, batch.labels, teachers))
    return {name: reduce(add, parts) for name, parts in found.items()}


def _latency(opened: OpenedRun) -> float:
    """Return the milliseconds of one image at a time."""
    student = Contender(opened.classifier, opened.recipe.precision)
    image = opened.validator.sample()[0].to(opened.device)
    return 1000 * latencies(student, {}, image, LatencyPlan(batch_sizes=(1,)))[0].seconds


def _beside(run: Path, opened: OpenedRun, points: int, overrides: Sequence[str]) -> tuple[Beside | None, str]:
    """Answer the same images as the teachers: those of the validation's cache, else of the cache that was learnt from.

    Returns why that is not possible, too.
    """
    validator = opened.validator
    recipe = opened.recipe
    if validator.cache is None:
        if not isinstance(recipe, StudentRecipe):
            return None, "learnt from labels: there is no teacher to compare with"
        try:
            require_known_source(run, recipe, overrides)
            require_known_images(run, recipe, overrides)
            cache = open_uncompared(recipe.cache)
            pairing = pairing_of(recipe, cache)
            views = views_of(only_logits(cache), recipe.dataset, recipe, pairing=pairing)
        except LogitCacheError as error:
            return None, f"not compared with its teachers: {str(error).splitlines()[0]}"
        assert recipe.validation is not None
        size = recipe.validation.batch_size
        chosen = present(views.dataset) if pairing is None else pairing.matched
        validator = Validator(views, only_logits(cache), size, recipe.num_workers, images=chosen, pairing=pairing)
    assert validator.cache is not None
    generator = np.random.default_rng(0)
    count = min(points, validator.num_images)
    some = np.sort(generator.choice(validator.num_images, count, replace=False)).tolist()
    beside = _answered(opened, validator, some)
    return (beside, "") if beside.is_finite else (None, "not compared with its teachers: answers are NaN or infinite")


@torch.no_grad()
def _answered(opened: OpenedRun, validator: Validator, some: list[int]) -> Beside:
    recipe, device = opened.recipe, opened.device
    assert validator.cache is not None
    kept, taps = comparable_features(validator), tuple(dict.fromkeys([*recipe.measured_taps, *recipe.taps]))
    parts: list[dict[str, Any]] = []
    what = "answer beside the teacher"
    for batch, logits, caught in tapped_batches(recipe, opened.classifier, validator, device, taps, what, some):
        features = {} if kept is None else pooled_features(kept, batch)
        parts.append(
            {
                "labels": batch.labels,
                "student": log_probs(logits.float()),
                "teachers": {name: targets.log_probs() for name, targets in batch.teachers.items()},
                "taps": caught,
                "features": {f"{teacher}.{name}": values for (teacher, name), values in features.items()},
            }
        )
    return Beside(source=validator.cache.location, **_joined(parts))


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the tensors of batches, also those in mappings, to arrays."""
    found: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        found[key] = _joined(values) if isinstance(value, dict) else torch.cat(values).cpu().numpy()
    return found
