"""Stage two: train a student from a cache, or any model on labels. One loop serves both."""

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.config.recipe import require_effect
from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.runtime.console import logger, track
from logitcache.runtime.device import own_randomness, resolve_device, synchronize
from logitcache.runtime.stopping import StopFlag, stop_flag
from logitcache.student.build_model import black, build_adapters, build_classifier, decide_layouts
from logitcache.student.ensembles import with_ensembles
from logitcache.student.evaluation.validation import Validator, open_validator
from logitcache.student.learner import Learner
from logitcache.student.lesson import LiveTargets, TrainingData, as_given, open_training_data
from logitcache.student.nonfinite import require_finite_targets
from logitcache.student.optim.batch_norm import require_possible
from logitcache.student.optim.schedules import Progress
from logitcache.student.ranks import Ranks, joined
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import (
    RunResult,
    best_epoch,
    extend,
    keep_if_best,
    require_measurable,
    save_kept,
)
from logitcache.student.runs.state_shapes import most_bytes, require_alike, require_place, require_shapes
from logitcache.student.runs.trained import Evaluation, evaluated_as
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.trial import require_trainable
from logitcache.targets import Batch
from logitcache.views.augmentations import Augmentation

SHOWN = ("top1", "top5", "mean_ap", "f1_macro", "agreement")
"""Metrics printed per epoch, if measured."""
BEST = ("top1", "mean_ap")
"""Metrics of which a run reports the best epoch."""


def train(
    recipe: StudentRecipe | TeacherRecipe,
    *,
    resume: bool = False,
    live: LiveTargets | None = None,
    dataset: object | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Train to the end of the recipe and return what was measured.

    `dataset` and `model` are objects in place of their recipe entries. The module is trained in place, from the weights
    that it has; a run that continues is given the same. `resume` continues from the run's checkpoint bit by bit; with
    more `epochs` than it had, a run goes on by the schedules of the longer run. `live` answers each batch in place of
    the cache (--online). The caller's global random state is the same afterwards. Under torchrun all processes train
    one model together, on parts of the same batches. Raises MismatchError before the first step if cache, images and
    recipe do not belong together, Stopped after SIGTERM or Ctrl-C.
    """
    with joined() as ranks:
        return _train(as_given(recipe, dataset, model), resume, live, dataset, model, ranks)


def _train(
    recipe: StudentRecipe | TeacherRecipe,
    resume: bool,
    live: LiveTargets | None,
    dataset: object | None,
    model: nn.Module | None,
    ranks: Ranks,
) -> RunResult:
    device = resolve_device(recipe.device)
    ranks.use(device)
    _require_parts(recipe, device, ranks)
    run = RunDirectory(recipe.out, ranks)
    before = run.require_recipe(recipe, resume)
    if not run.begun:
        require_effect(recipe, recipe.epochs)
    data = open_training_data(recipe, live, run.learns_from(), ranks, dataset)
    validator = open_validator(recipe, data.lesson.num_classes)
    require_measurable(recipe, validator)
    identity = data.identity | ({} if validator is None else {"validation": validator.identity()})
    run.require_identity(identity)
    if (finished := run.finished(RunResult)) is not None and finished.epochs >= recipe.epochs:
        logger.info(f"{run.path} is finished, there is nothing to do")
        return finished
    with own_randomness(device, recipe.seed):
        sample = None if validator is None else validator.sample()
        classifier = build_classifier(recipe, data.lesson, sample, model)
        layouts = decide_layouts(recipe, classifier, black(data.lesson))
        adapters = build_adapters(recipe, data.lesson, classifier, layouts)
        require_trainable(recipe, data.lesson, classifier, device, layouts, ranks.size)
        learner = Learner(recipe, classifier, device, adapters, ranks, layouts)
        with run.held(), stop_flag() as stop:
            if resume and not run.begun:
                logger.info(f"there is no run in {run.path} to resume: a new one starts")
            _take_up(learner, run, len(data.loader), recipe.epochs)
            if before is not None:
                extend(recipe, run, before, learner.step, len(data.loader))
            run.open(recipe, identity)
            while learner.epoch < recipe.epochs:
                _train_epoch(recipe, data, learner, run, stop)
                measured = _measure(recipe, data, learner, run, validator, stop)
                _finish_epoch(recipe, data, learner, run, measured)
    height, width = (data.lesson.image_shape if sample is None else sample.shape)[-2:]
    augmentations = evaluated_as(() if validator is None else validator.augmentations, (height, width))
    return _finish_run(recipe, data, learner, run, augmentations)


def _require_parts(recipe: TrainingRecipe, device: torch.device, ranks: Ranks) -> None:
    """Raise RecipeError for what a process cannot compute on its part of a batch."""
    if recipe.sync_batch_norm:
        require_possible(device, ranks)
    remembering = [f"losses.{n} ({loss.kind})" for n, loss in enumerate(recipe.losses) if loss.remembers_rows]
    if remembering and ranks.size > 1:
        raise RecipeError(
            f"{', '.join(remembering)} remembers every row that it saw, and each of {ranks.size} processes sees "
            "a part. Fix: one process (--nproc-per-node 1), or other losses"
        )


def _take_up(learner: Learner, run: RunDirectory, num_batches: int, epochs: int) -> None:
    """Continue from the checkpoint, if there is one, which lies within epochs of so many batches."""
    if run.begun:
        own = learner.state()
        saved = run.load_checkpoint(most_bytes(own))
        with run.reading(run.checkpoint):
            require_alike(saved, own)
            require_place(saved.get("place", (0, 0, 0)), num_batches, epochs)
        try:
            learner.load(saved)
        except Exception as cause:  # what a module does with a foreign state is its own business
            # Earlier releases read every tap as channels first.
            turned = [f"{tap}: channels_first" for tap, layout in learner.layouts.items() if layout == "channels_last"]
            entry = f"tap_layouts: {{{', '.join(turned)}}}, " if turned else ""
            raise MismatchError(
                f"{run.checkpoint} is of another model or release: {cause}. "
                f"Fix: {entry}the code that began this run, or another `out:`"
            ) from cause
        with run.reading(run.checkpoint):
            require_shapes(learner.optimizer)
    run.rewind(learner.epoch)


def _train_epoch(
    recipe: TrainingRecipe, data: TrainingData, learner: Learner, run: RunDirectory, stop: StopFlag
) -> None:
    """Run an epoch, from where the learner is in it: the loop of stage two."""
    started = time.perf_counter() - learner.seconds
    learner.trained.train()
    batches = data.loader.epoch(learner.epoch, learner.batch)
    name = f"epoch {learner.epoch + 1}/{recipe.epochs}"
    for batch in track(batches, name, len(data.loader), "batches", learner.batch):
        batch = batch.to(learner.device)
        batch = batch if data.live is None else replace(batch, teachers=data.live(batch.images, batch.labels))
        batch = with_ensembles(batch, data.ensembles)
        progress = Progress(learner.step, len(data.loader), recipe.epochs)
        factor = recipe.schedule.factor(learner.step, len(data.loader), recipe.epochs)
        for group in learner.optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * factor
        rows = learner.ranks.mean_rows(_rows(recipe, batch))
        micros = _split(batch, recipe.micro_batches)
        for micro in micros:
            with learner.ranks.exchanging(learner.terms, micro is micros[-1]):
                terms: Tensor = learner.terms(micro, progress)
                micro_rows = _rows(recipe, micro)
                loss_of_batch = (terms * (micro_rows / rows)).sum()
                learner.scaler.scale(loss_of_batch).backward()  # type: ignore[no-untyped-call]
            learner.add(terms, micro_rows)
        learner.scaler.unscale_(learner.optimizer)
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(learner.trained.parameters(), recipe.clip_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        learner.end_step()
        learner.seconds = time.perf_counter() - started
        _keep_place(recipe, data, learner, run, learner.ranks.agreed(stop))
    synchronize(learner.device)
    learner.seconds = time.perf_counter() - started


def _split(batch: Batch, count: int) -> list[Batch]:
    size = -(-len(batch) // count)
    return [batch[slice(start, start + size)] for start in range(0, len(batch), size)]


def _rows(recipe: TrainingRecipe, batch: Batch) -> Tensor:
    """Count the rows that each loss is a mean over, [L]: micro-batches then sum to what the whole batch gives."""
    return torch.stack([loss.rows(batch) for loss in recipe.losses])


def _keep_place(
    recipe: TrainingRecipe, data: TrainingData, learner: Learner, run: RunDirectory, stop: StopFlag
) -> None:
    if stop or (recipe.checkpoint_steps is not None and learner.step % recipe.checkpoint_steps == 0):
        _save(data, learner, run)
    if stop:
        raise stop.stopped(
            f"stopped in epoch {learner.epoch + 1} after step {learner.step}; the state is in {run.checkpoint}. "
            "The same command with --resume continues"
        )


def _save(data: TrainingData, learner: Learner, run: RunDirectory) -> None:
    _require_finite(data, learner, run)
    run.save_checkpoint(learner.state())


def _require_finite(data: TrainingData, learner: Learner, run: RunDirectory) -> None:
    """Raise LogitCacheError if training has diverged: a checkpoint of that would be of no use."""
    if not learner.finite():
        if data.cache is not None:
            require_finite_targets(data.loader, learner.epoch, learner.batch, data.cache)
        raise LogitCacheError(
            f"epoch {learner.epoch + 1}, step {learner.step}: the loss or the weights are no longer finite (loss "
            f"{sum(learner.means())}); the last checkpoint in {run.path} is from before. Fix: train again into another "
            "`out:` with a lower optimizer.lr, schedule.warmup_epochs, or clip_norm"
        )


def _measure(
    recipe: TrainingRecipe,
    data: TrainingData,
    learner: Learner,
    run: RunDirectory,
    validator: Validator | None,
    stop: StopFlag,
) -> dict[str, float]:
    """Measure, after an epoch that asks for it; the state is kept first, so that a stop loses nothing."""
    last = learner.epoch + 1 == recipe.epochs
    every = recipe.validation.every if recipe.validation is not None else 1
    if validator is None or not (last or (learner.epoch + 1) % every == 0):
        return {}
    _save(data, learner, run)
    learner.share_statistics()
    tally = validator.tally(learner.measured, learner.device, recipe.precision, learner.ranks, stop)
    return {f"val_{name}": value for name, value in asdict(tally.measures()).items() if value is not None}


def _finish_epoch(
    recipe: TrainingRecipe, data: TrainingData, learner: Learner, run: RunDirectory, measured: dict[str, float]
) -> None:
    """Record the epoch and go to the next."""
    _require_finite(data, learner, run)
    means = learner.means()
    row: dict[str, Any] = {
        "epoch": learner.epoch,
        "step": learner.step,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "loss": sum(means),
    }
    row |= {f"loss_{n}_{loss.kind}": mean for n, (loss, mean) in enumerate(zip(recipe.losses, means, strict=True))}
    row |= learner.in_effect(recipe.losses, Progress(learner.step - 1, len(data.loader), recipe.epochs))
    speed = data.loader.images_per_epoch / max(learner.seconds, 1e-9)
    row |= {"seconds": round(learner.seconds, 3), "images_per_second": round(speed, 1)}
    row |= measured
    if recipe.keep == "best" and measured:
        keep_if_best(learner, run, row)
    learner.end_epoch()
    run.record(row)
    _save(data, learner, run)
    shown = [f"epoch {row['epoch'] + 1}/{recipe.epochs}", f"loss {row['loss']:.4f}"]
    shown += [f"{name} {100 * row[f'val_{name}']:.2f} %" for name in SHOWN if f"val_{name}" in row]
    logger.info("  ".join([*shown, f"{row['seconds']:.1f} s"]))


def _finish_run(
    recipe: TrainingRecipe,
    data: TrainingData,
    learner: Learner,
    run: RunDirectory,
    augmentations: tuple[Augmentation, ...],
) -> RunResult:
    rows, images = run.rows, recipe.epochs * data.loader.images_per_epoch
    last, kept = rows[-1], rows[best_epoch(rows) if recipe.keep == "best" else -1]
    evaluation = Evaluation(augmentations=augmentations, class_names=data.class_names, epoch=kept["epoch"] + 1)
    learner.ranks.by_first(lambda: save_kept(recipe, run, learner, data.lesson.num_classes, evaluation))
    measured = {name: kept.get(f"val_{name}") for name in (*SHOWN, "f1_micro")}
    of_epochs = {name: [row[f"val_{name}"] for row in rows if f"val_{name}" in row] for name in BEST}
    best = {f"best_{name}": max(values, default=None) for name, values in of_epochs.items()}
    result = RunResult(
        out=str(run.path),
        epochs=recipe.epochs,
        steps=learner.step,
        images=images,
        seconds=round(sum(row["seconds"] for row in rows), 3),
        num_parameters=sum(p.numel() for p in learner.measured.parameters()),
        loss=last["loss"],
        **best,
        teacher_passes=images * data.num_live,
        **measured,
    )
    run.finish(asdict(result))
    learner.ranks.by_first(lambda: run.best.unlink(missing_ok=True))
    return result
