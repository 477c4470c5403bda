"""Stage two: train a student from a cache, or any model on labels. One loop serves both."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from logitcache.console import say, track
from logitcache.device import autocast, resolve_device
from logitcache.errors import LogitCacheError, MismatchError
from logitcache.models import Classifier, StoredModel, default_preprocessing, resolve_preprocessing, save_model
from logitcache.stopping import StopFlag, stop_flag
from logitcache.student.evaluation import Validator, open_validator
from logitcache.student.learner import Learner
from logitcache.student.recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.student.run import RunDirectory
from logitcache.student.sources import LiveTargets, Source, open_source
from logitcache.targets import Batch, Targets
from logitcache.views.keys import ViewKey


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured; accuracies are fractions of the validation images, None where it had none."""

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


def train(recipe: StudentRecipe | TeacherRecipe, *, resume: bool = False, live: LiveTargets | None = None) -> RunResult:
    """Train to the end of the recipe and return what was measured.

    `resume` continues from the run's checkpoint bit by bit. `live` answers each batch in place of the cache (--online).
    The caller's global random state is the same afterwards. Raises MismatchError before the first step where cache,
    images and recipe do not belong together, Stopped after SIGTERM or Ctrl-C.
    """
    device = resolve_device(recipe.device)
    source = open_source(recipe, live)
    validator = open_validator(recipe.validation, source.num_classes, recipe.num_workers)
    run = RunDirectory(recipe.out)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(recipe.seed)
        classifier = _build(recipe, source)
        learner = Learner(recipe, classifier, len(recipe.losses), device)
        run.open(recipe, source.identity, resume)
        saved = run.load_checkpoint(device)
        if saved is not None:
            learner.load(saved)
        run.rewind(learner.epoch)
        with stop_flag() as stop:
            while learner.epoch < recipe.epochs:
                _train_epoch(recipe, source, learner, run, stop)
                _finish_epoch(recipe, learner, run, validator)
    return _finish_run(recipe, source, learner, run)


def _build(recipe: TrainingRecipe, source: Source) -> Classifier:
    """Build the model and prove, on two black images, that it answers for the right number of classes."""
    shape = source.loader.views[ViewKey(0, 0)].shape
    built = recipe.model.build(source.num_classes, shape[0])
    preprocessing = resolve_preprocessing(
        built, recipe.preprocessing, who="the recipe", default=default_preprocessing(shape[0])
    )
    classifier = Classifier(built.module, preprocessing)
    classifier.eval()
    with torch.no_grad():
        found = classifier(torch.zeros((2, *shape), dtype=torch.uint8)).shape[1]
    if found != source.num_classes:
        raise MismatchError(
            f"the model predicts {found} classes, what it learns from has {source.num_classes}. "
            f"Fix: a model with {source.num_classes} classes"
        )
    return classifier


def _train_epoch(recipe: TrainingRecipe, source: Source, learner: Learner, run: RunDirectory, stop: StopFlag) -> None:
    """Run an epoch, from where the learner is in it: the loop of stage two."""
    started = time.perf_counter() - learner.seconds
    learner.model.train()
    batches = source.loader.epoch(learner.epoch, learner.batch)
    for batch in track(
        batches, f"epoch {learner.epoch + 1}/{recipe.epochs}", len(source.loader), "batches", learner.batch
    ):
        batch = _on_device(batch, learner, source.live)
        factor = recipe.schedule.factor(learner.step, len(source.loader), recipe.epochs)
        for group in learner.optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * factor
        for micro in _split(batch, recipe.micro_batches):
            with autocast(learner.device, recipe.precision):
                logits = learner.forward(micro.images)
            terms = torch.stack([loss(Targets(logits), micro) * loss.weight for loss in recipe.losses])
            learner.scaler.scale(terms.sum() * (len(micro) / len(batch))).backward()  # type: ignore[no-untyped-call]
            learner.add(terms, len(micro))
        learner.scaler.unscale_(learner.optimizer)
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(learner.model.parameters(), recipe.clip_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.ema is not None:
            learner.ema.update_parameters(learner.model)
        learner.step += 1
        learner.batch += 1
        learner.seconds = time.perf_counter() - started
        _keep_place(recipe, learner, run, stop)


def _on_device(batch: Batch, learner: Learner, live: LiveTargets | None) -> Batch:
    batch = batch.to(learner.device)
    return batch if live is None else replace(batch, teachers=live(batch.images))


def _split(batch: Batch, count: int) -> list[Batch]:
    size = -(-len(batch) // count)
    return [batch[slice(start, start + size)] for start in range(0, len(batch), size)]


def _keep_place(recipe: TrainingRecipe, learner: Learner, run: RunDirectory, stop: StopFlag) -> None:
    due = recipe.checkpoint_steps is not None and learner.step % recipe.checkpoint_steps == 0
    if due or stop:
        run.save_checkpoint(learner.state())
    if stop:
        raise stop.stopped(
            f"stopped in epoch {learner.epoch + 1} after step {learner.step}; the state is in {run.checkpoint}. "
            "The same command with --resume continues"
        )


def _finish_epoch(recipe: TrainingRecipe, learner: Learner, run: RunDirectory, validator: Validator | None) -> None:
    """Measure, record and save."""
    *terms, count = learner.sums.tolist()
    means = [term / count for term in terms]
    if not all(torch.isfinite(torch.tensor(means))):
        raise LogitCacheError(
            f"the loss became {sum(means)} in epoch {learner.epoch + 1}; the checkpoint of the epoch before is kept. "
            "Fix: a lower optimizer.lr, schedule.warmup_epochs, or clip_norm"
        )
    row: dict[str, Any] = {
        "epoch": learner.epoch,
        "step": learner.step,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "loss": sum(means),
    }
    row |= {f"loss_{n}_{loss.kind}": mean for n, (loss, mean) in enumerate(zip(recipe.losses, means, strict=True))}
    row |= {"seconds": round(learner.seconds, 3), "images_per_second": round(count / max(learner.seconds, 1e-9), 1)}
    last = learner.epoch + 1 == recipe.epochs
    if (
        validator is not None
        and recipe.validation is not None
        and (last or (learner.epoch + 1) % recipe.validation.every == 0)
    ):
        measures = validator.measure(learner.measured, learner.device, recipe.precision)
        row |= {f"val_{name}": value for name, value in asdict(measures).items() if value is not None}
    learner.epoch, learner.batch, learner.seconds = learner.epoch + 1, 0, 0.0
    learner.sums.zero_()
    run.record(row)
    run.save_checkpoint(learner.state())
    say(_line(row, recipe.epochs))


def _line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs}", f"loss {row['loss']:.4f}"]
    parts += [
        f"{name} {100 * row[f'val_{name}']:.2f} %" for name in ("top1", "top5", "agreement") if f"val_{name}" in row
    ]
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def _finish_run(recipe: TrainingRecipe, source: Source, learner: Learner, run: RunDirectory) -> RunResult:
    classifier = learner.measured
    assert isinstance(classifier, Classifier)
    channels = len(classifier.preprocessing.mean)
    stored = StoredModel(
        model=recipe.model.architecture(),
        preprocessing=classifier.preprocessing,
        num_classes=source.num_classes,
        in_channels=channels,
    )
    save_model(run.path, classifier.module, stored)
    last, images = run.rows[-1], recipe.epochs * source.loader.images_per_epoch
    measured = {name: last.get(f"val_{name}") for name in ("top1", "top5", "agreement")}
    result = RunResult(
        out=str(run.path),
        epochs=recipe.epochs,
        steps=learner.step,
        images=images,
        seconds=round(sum(row["seconds"] for row in run.rows), 3),
        num_parameters=sum(p.numel() for p in classifier.parameters()),
        loss=last["loss"],
        best_top1=max((row["val_top1"] for row in run.rows if "val_top1" in row), default=None),
        teacher_passes=images if source.live is not None else 0,
        **measured,
    )
    run.finish(asdict(result))
    return result
