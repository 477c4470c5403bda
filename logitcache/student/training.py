"""Stage two: train students from a cache, or any model on labels. One loop serves one student and many."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from logitcache.config.recipe import require_effect
from logitcache.errors import Stopped
from logitcache.models import Pruned, QuantizedRun
from logitcache.runtime.console import duration, logger, track
from logitcache.runtime.device import OwnRandomness, resolve_device, synchronize
from logitcache.runtime.stopping import StopFlag, stop_flag
from logitcache.student.build_model import black, build_adapters, build_classifier, decide_layouts, describe
from logitcache.student.distributed.ranks import ALONE, Ranks, joined
from logitcache.student.evaluation.validation import Validator, open_validator
from logitcache.student.learner import Learner
from logitcache.student.lesson import Lesson, LiveTargets, as_given
from logitcache.student.optim.batch_norm import warn_of_unsettled
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import RunResult, require_measurable
from logitcache.student.runs.same_recipe import require_same
from logitcache.student.runs.trained import Evaluation, evaluated_as
from logitcache.student.runs.training_run import SHOWN, TrainingRun
from logitcache.student.speed import as_recorded, without_auto
from logitcache.student.trackers.live import tracked
from logitcache.student.training_data import Stream, TrainingData, open_training_data
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.trial import require_parts, require_trainable
from logitcache.targets import Batch
from logitcache.views.datasets.base import orientation_of

AnyRecipe = StudentRecipe | TeacherRecipe
T = TypeVar("T")
R = TypeVar("R")


class Watcher:
    """Callbacks for the errors and metrics of each student; by default errors are raised and metrics logged."""

    def begins(self, directory: RunDirectory, resumes: bool) -> None:
        """Take note that a run begins or, if it `resumes`, continues."""
        if resumes and not directory.begun:
            logger.info(f"there is no run in {directory.path} to resume: a new one starts")

    def failed(self, recipe: TrainingRecipe, error: Exception) -> None:
        """Record that a student failed, which then leaves; or raise."""
        raise error

    def ended_epoch(self, recipe: TrainingRecipe, row: dict[str, Any]) -> None:
        """Show the metrics of an epoch."""
        shown = [f"epoch {row['epoch'] + 1}/{recipe.epochs}", f"loss {row['loss']:.4f}"]
        shown += [f"{name} {100 * row[f'val_{name}']:.2f} %" for name in SHOWN if f"val_{name}" in row]
        seconds = row["seconds"]
        left = (recipe.epochs - row["epoch"] - 1) * seconds
        logger.info("  ".join([*shown, f"{seconds:.1f} s" + f", about {duration(left)} left" * (left > 0)]))

    def shared(self, batch: Batch, students: int, seconds: float) -> None:
        """Take note that students waited so long for a batch, and now train on it."""

    def each(self, recipe_of: Callable[[T], TrainingRecipe], act: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return what a function makes of the items of those students that do not fail in it; a stop ends all."""
        made = []
        for item in items:
            try:
                made.append(act(item))
            except Stopped:
                raise
            except Exception as error:  # models and losses of the user's own may raise anything
                self.failed(recipe_of(item), error)
        return made


def train(
    recipe: AnyRecipe,
    *,
    resume: bool = False,
    live: LiveTargets | None = None,
    dataset: object | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Train to the end of the recipe and return the results.

    `dataset` and `model` are objects in place of their recipe entries. The module is trained in place, from its current
    weights; to resume, pass the same objects. `resume` continues from the run's checkpoint bit for bit; with more
    `epochs`, a run follows the schedules of the longer run. `live` computes the targets of each batch instead of the
    cache (--online). The caller's global random state does not change. Under torchrun all processes train one model
    together, on parts of the same batches. Raises MismatchError before the first step if cache, images and recipe do
    not belong together, Stopped after SIGTERM or Ctrl-C.
    """
    with joined() as ranks:
        given = as_given(recipe, dataset, model)
        (result,) = train_together(
            [given], Watcher(), resume=resume, live=live, dataset=dataset, model=model, ranks=ranks
        )
        return result


def train_together(
    recipes: Sequence[AnyRecipe],
    watcher: Watcher,
    *,
    resume: bool = True,
    until: int | None = None,
    stop: StopFlag | None = None,
    live: LiveTargets | None = None,
    dataset: object | None = None,
    model: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> list[RunResult]:
    """Train students on one stream, each bit for bit as alone; return the results of those that finished.

    Batches are rendered, read and moved once for all: the recipes agree in what decides them. A student whose own part
    fails leaves. With `until`, all pause after so many epochs. `stop` is the caller's flag; by default SIGTERM and
    Ctrl-C stop.
    """
    device = resolve_device(recipes[0].device)
    ranks.use(device)
    starts = watcher.each(lambda recipe: recipe, lambda recipe: _Start.of(recipe, device, resume, ranks), recipes)
    if not starts:
        return []
    data = open_training_data(starts[0].recipe, live, starts[0].directory.learns_from(), dataset)
    starts = watcher.each(_recipe, lambda start: start._replace(lesson=data.lesson(start.recipe)), starts)
    if not starts:
        return []
    stream = data.stream([start.recipe for start in starts], ranks)
    opened = _Opened(data, stream, {}, device, ranks, lambda directory: watcher.begins(directory, resume))
    with ExitStack() as locks:
        found = watcher.each(_recipe, lambda start: _prepare(start, opened, model, locks), starts)
        results = [result for result in found if isinstance(result, RunResult)]
        group = _Group([run for run in found if isinstance(run, TrainingRun)], watcher)
        found.clear()
        with stop_flag() if stop is None else nullcontext(stop) as flag:
            return results + _train(group, opened, flag, until)


class _Start(NamedTuple):
    """A recipe that agrees with its run directory, how many epochs a run had that it extends, and its lesson."""

    recipe: AnyRecipe
    directory: RunDirectory
    before: int | None
    lesson: Lesson | None = None

    @classmethod
    def of(cls, recipe: AnyRecipe, device: torch.device, resume: bool, ranks: Ranks) -> "_Start":
        """Check a recipe by itself, and against what its run directory holds."""
        require_parts(recipe, device, ranks)
        directory = RunDirectory(recipe.out, ranks)
        begun = directory.begun_recipe(type(recipe), resume)
        if begun is None:
            require_effect(recipe, recipe.epochs)
            return cls(recipe, directory, None)
        recipe = as_recorded(recipe, begun)
        return cls(recipe, directory, require_same(directory.path, begun, recipe))


def _recipe(item: "_Start | TrainingRun") -> TrainingRecipe:
    return item.recipe


class _Opened(NamedTuple):
    """What the students of a stream share."""

    data: TrainingData
    stream: Stream
    validators: dict[str, Validator]
    device: torch.device
    ranks: Ranks
    begins: Callable[[RunDirectory], None]


def _prepare(start: _Start, opened: _Opened, model: nn.Module | None, locks: ExitStack) -> TrainingRun | RunResult:
    """Compare a run with its data, build the student, and continue from a checkpoint; or return a finished result."""
    (recipe, directory, before, lesson), (data, stream, validators, device, ranks, begins) = start, opened
    assert lesson is not None
    validator = open_validator(
        recipe, lesson.num_classes, validators, stream.loader.views, directory.learns_from().get("validation")
    )
    identity = data.identity(recipe) | ({} if validator is None else {"validation": validator.identity()})
    if isinstance(recipe.model, Pruned | QuantizedRun):
        identity["parent"] = recipe.model.parent()
    directory.require_identity(identity)
    if (finished := directory.finished(RunResult)) is not None and finished.epochs >= recipe.epochs:
        logger.info(f"{directory.path} is finished, there is nothing to do")
        return finished
    with (randomness := OwnRandomness(device, recipe.seed)):
        sample = None if validator is None else validator.sample()
        classifier = build_classifier(recipe, lesson, sample, model)
        require_measurable(recipe, validator, sample, lesson.image_shape, classifier.preprocessing)
        recipe = without_auto(recipe, classifier, black(lesson), device)
        layouts = decide_layouts(recipe, classifier, black(lesson))
        adapters = build_adapters(recipe, lesson, classifier, layouts)
        require_trainable(recipe, lesson, classifier, device, layouts, ranks.size)
        learner = Learner(recipe, classifier, device, adapters, ranks, layouts)
        warn_of_unsettled(learner.model, recipe.epochs * len(stream.loader) * recipe.micro_batches)
        height, width = (lesson.image_shape if sample is None else sample.shape)[-2:]
        evaluation = Evaluation(
            augmentations=evaluated_as(() if validator is None else validator.augmentations, (height, width)),
            class_names=stream.class_names(lesson.num_classes) or data.predicted_classes(recipe, lesson.num_classes),
            epoch=recipe.epochs,
            orientation=orientation_of((stream.loader.views if validator is None else validator.views).dataset),
        )
        stored = describe(recipe, classifier, lesson)
        locks.enter_context(directory.held())
        begins(directory)
        run = TrainingRun(recipe, learner, randomness, directory, stream, validator, evaluation, stored)
        run.take_up(before)
        directory.open(recipe, identity)
        locks.enter_context(tracked(directory, recipe.trackers))
    return run


class _Group:
    """The students of a stream; one that fails leaves at once, and its memory is free for the others."""

    def __init__(self, runs: list[TrainingRun], watcher: Watcher) -> None:
        self.runs, self.watcher = runs, watcher

    def at(self, epoch: int) -> list[TrainingRun]:
        """Return the students in an epoch: others may be ahead, and wait."""
        return [run for run in self.runs if run.learner.epoch == epoch]

    def each(self, act: Callable[[TrainingRun], R], runs: Sequence[TrainingRun]) -> list[R]:
        """Let some of the students act in turn."""
        made = self.watcher.each(_recipe, lambda run: (run, act(run)), runs)
        if len(made) < len(runs):
            failed = {id(run) for run in runs} - {id(run) for run, _ in made}
            self.runs = [run for run in self.runs if id(run) not in failed]
        return [value for _, value in made]

    def step(self, batch: Batch, runs: Sequence[TrainingRun]) -> None:
        """Let students train on a batch."""
        self.each(lambda run: run.step(batch), runs)

    def measure(self, validator: Validator, epoch: int, batch: Batch) -> None:
        """Let the students that a validator measures in this epoch answer to a batch of its images."""
        due = [run for run in self.at(epoch) if run.is_measured and run.validator is validator]
        self.each(lambda run: run.measure(batch), due)

    def share_wait(self, waiting: Sequence[TrainingRun], seconds: float) -> None:
        """Add the time in which students waited to theirs, in equal parts."""
        for run in waiting:
            run.learner.seconds += seconds / len(waiting)


def _train(group: _Group, opened: _Opened, stop: StopFlag, until: int | None) -> list[RunResult]:
    """Train epoch by epoch; those that are behind catch up first."""
    results: list[RunResult] = []
    while True:
        results += group.each(TrainingRun.finish, [run for run in group.runs if run.is_over])
        group.runs = [run for run in group.runs if not run.is_over]
        epochs = [run.learner.epoch for run in group.runs if until is None or run.learner.epoch < until]
        if not epochs:
            return results
        epoch = min(epochs)
        _train_epoch(group, opened, epoch, stop)
        _measure(group, opened, epoch, stop)
        for recipe, row in group.each(lambda run: (run.recipe, run.end_epoch()), group.at(epoch)):
            group.watcher.ended_epoch(recipe, row)


def _train_epoch(group: _Group, opened: _Opened, epoch: int, stop: StopFlag) -> None:
    """Give each batch of an epoch to the students that have not seen it: the loop of stage two."""
    stream, device, runs = opened.stream, opened.device, group.at(epoch)
    start, num_epochs = min(run.learner.batch for run in runs), max(run.recipe.epochs for run in runs)
    for run in runs:
        run.learner.trained.train()
    name = f"epoch {epoch + 1}/{num_epochs}" + f", {len(runs)} students" * (len(runs) > 1)
    batches = track(stream.batches(device, epoch, start), name, len(stream.loader), "batches", start)
    del run, runs  # one that fails must not stay in memory
    since = time.perf_counter()
    for number, batch in enumerate(batches, start):
        waiting, waited = group.at(epoch), time.perf_counter() - since
        group.share_wait(waiting, waited)
        taking = [run for run in waiting if run.learner.batch <= number]
        group.watcher.shared(batch, len(taking), waited)
        group.step(batch, taking)
        del waiting, taking
        since = time.perf_counter()
        if agreed := opened.ranks.agreed(stop):
            group.each(TrainingRun.save, group.at(epoch))
            for run in group.runs:
                raise run.stopped(agreed)
        if not group.at(epoch):
            return
    synchronize(device)
    group.share_wait(group.at(epoch), time.perf_counter() - since)


def _measure(group: _Group, opened: _Opened, epoch: int, stop: StopFlag) -> None:
    """Measure the students whose epoch asks for it, those of the same images together."""
    group.each(TrainingRun.begin_measuring, [run for run in group.at(epoch) if run.is_measured])
    for validator in opened.validators.values():
        if any(run.validator is validator for run in group.at(epoch) if run.is_measured):
            validator.each_batch(partial(group.measure, validator, epoch), opened.device, opened.ranks, stop)
