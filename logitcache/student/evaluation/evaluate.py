"""Measure a finished run: accuracy, calibration, likeness to its teacher, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.cache import Cache
from logitcache.cache.snapshot import open_snapshot
from logitcache.config.recipe import is_stated
from logitcache.errors import CacheError, DataError, MismatchError, RemoteError
from logitcache.models import read_stored
from logitcache.runtime.console import logger
from logitcache.student.evaluation.alignment import TapSimilarity, compare_taps
from logitcache.student.evaluation.cost import Contender, Cost, Latency, LatencyPlan, costs, failing, latencies
from logitcache.student.evaluation.multi_label import ClassPrecision, GroupPrecision
from logitcache.student.evaluation.open_run import open_run, require_known_source, unopened_recipe
from logitcache.student.evaluation.single_label import ClassAccuracy, GroupAccuracy
from logitcache.student.evaluation.validation import AnyMeasures
from logitcache.student.lesson import begun_with, learned_labels, pairing_of
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.trained import read_evaluation
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets import open_dataset
from logitcache.views.datasets.custom import Custom as CustomImages
from logitcache.views.datasets.images.labels import class_counts as count_classes


@dataclass(frozen=True)
class EvaluationResult:
    """A finished run, measured.

    `retention` is the student's top-1 over its teacher's, of images of any number of classes the mean average
    precision. `images_left_out` are those that `validation.class_map` does not name, or that have no label there; they
    are in no figure. `groups` are None if the numbers of training images are not known. `costs` are of the student
    and of the teachers of the cache that it learnt from; `latencies` only if they are asked for, `cka` if the images'
    cache has features. `teachers_left_out`: why a teacher has no row, `teachers_failed`: which of these the user named.
    The weights are those after `epoch`, counted from 1; None if the run did not record it.
    """

    run: str
    images: int
    images_left_out: int
    measures: AnyMeasures
    retention: float | None
    groups: tuple[GroupAccuracy, ...] | tuple[GroupPrecision, ...] | None
    costs: tuple[Cost, ...]
    latencies: tuple[Latency, ...]
    cka: tuple[TapSimilarity, ...]
    per_class: tuple[ClassAccuracy, ...] | tuple[ClassPrecision, ...]
    teachers_left_out: Mapping[str, str] = field(default_factory=dict)
    teachers_failed: tuple[str, ...] = ()
    epoch: int | None = None


def evaluate(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    latency: LatencyPlan | None = None,
    teachers: Mapping[str, Contender | None] | None = None,
) -> EvaluationResult:
    """Evaluate a finished run on its recipe's validation images, or on others given by `overrides`
    (validation.cache=…).

    A factory named in the run's files is not called unless the user names it again. The costs of `teachers`, if given,
    are measured like the student's.
    """
    run = Path(run)
    recipe, classifier, validator, device = open_run(run, overrides)
    assert recipe.validation is not None, "or there would be no images"
    trained_by, class_counts = _learnt_from(run, recipe, read_stored(run / "model.json").num_classes, overrides)
    tally = validator.tally(classifier, device, recipe.precision)
    measures, per_class = tally.measures(), tally.per_class(validator.class_names, class_counts)
    own, teacher, image = measures.quality, measures.teacher_quality, validator.sample()[0].to(device)
    if isinstance(recipe, StudentRecipe) and validator.cache is None:
        logger.info(
            "these images have no cached answers of the teacher: agreement and KL are not measured. Fix: precompute a "
            "cache of them, and --set validation.dataset=null --set validation.cache=CACHE"
        )
    beside = dict.fromkeys(trained_by) | dict(teachers or {})
    left_out = failing(beside, image)
    beside |= dict.fromkeys(left_out)
    student, groups = Contender(classifier, recipe.precision), recipe.validation.groups
    return EvaluationResult(
        run=str(run),
        images=validator.num_images,
        images_left_out=validator.num_left_out,
        measures=measures,
        retention=None if own is None or not teacher else own / teacher,
        groups=tally.groups(class_counts, groups.head, groups.tail),
        costs=costs(classifier, beside, image),
        latencies=() if latency is None else latencies(student, beside, image, latency),
        cka=compare_taps(recipe, classifier, validator, device),
        per_class=per_class,
        teachers_left_out=left_out,
        epoch=None if (recorded := read_evaluation(run)) is None else recorded.epoch,
    )


def _learnt_from(
    run: Path, recipe: StudentRecipe | TeacherRecipe, num_classes: int, overrides: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """Return the teachers of a run, and its training images of each class [C], if the model's; both may be gone."""
    try:
        if isinstance(recipe, StudentRecipe):
            require_known_source(run, recipe, overrides)
            # No answer of it is read.
            cache = begun_with(Cache(open_snapshot(recipe.cache)), RunDirectory(str(run)).learns_from())
            teachers, labelled = tuple(cache.manifest.teachers), cache.manifest.fingerprint.num_classes
            if recipe.without:
                logger.info("training images are not counted: the run left some out (without)")
                return teachers, None
            # Images that the user names to measure on replace a split by which the run held images out.
            trained = recipe.model_copy(update={"validation": unopened_recipe(run).validation})
            labels = learned_labels(trained, cache, pairing_of(recipe, cache))
        elif isinstance(recipe.dataset, CustomImages) and not is_stated("dataset.factory", overrides):
            logger.info(
                f"training images are not counted: --set dataset.factory={recipe.dataset.factory} lets them be opened"
            )
            return (), None
        elif recipe.dataset is None:
            logger.info("training images are not counted: they were passed to train as an object. Fix: --set dataset=…")
            return (), None
        else:
            require_known_source(run, recipe, overrides)
            images = open_dataset(recipe.dataset)
            teachers, labels, labelled = (), images.labels, images.num_classes
    except (CacheError, DataError, MismatchError, RemoteError) as error:
        logger.info(f"training images are not counted, and teachers not weighed: {error}")
        return (), None
    return teachers, count_classes(labels, num_classes) if labelled == num_classes else None
