"""A student in training and its run directory: steps on batches, and ends of epochs."""

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from logitcache.errors import DivergenceError, MismatchError
from logitcache.models import StoredModel
from logitcache.runtime.device import OwnRandomness
from logitcache.runtime.stopping import StopFlag
from logitcache.student.evaluation.validation import Counted, Validator
from logitcache.student.learner import Learner
from logitcache.student.nonfinite import require_finite_targets
from logitcache.student.optim.schedules import Progress
from logitcache.student.runs.run_directory import RunDirectory
from logitcache.student.runs.run_result import RunResult, best_epoch, extend, keep_if_best, save_kept
from logitcache.student.runs.state_shapes import most_state_bytes, require_alike, require_position, require_shapes
from logitcache.student.runs.trained import Evaluation
from logitcache.student.training_data import Stream
from logitcache.student.training_recipes import TrainingRecipe
from logitcache.targets import Batch

SHOWN = ("top1", "top5", "mean_ap", "f1_macro", "agreement")
"""Metrics printed per epoch, if measured."""
BEST = ("top1", "mean_ap")
"""Metrics of which a run reports the best epoch."""


class TrainingRun:
    """A student on a stream of batches.

    It has random states of its own: on a shared stream it trains bit for bit as it does alone.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        learner: Learner,
        randomness: OwnRandomness,
        directory: RunDirectory,
        stream: Stream,
        validator: Validator | None,
        evaluation: Evaluation,
        stored: StoredModel,
    ) -> None:
        """Wrap a learner; `evaluation` is the preprocessing of evaluation, without its epoch.

        `stored` describes the trained model: weights that training starts from are not needed to load it.
        """
        self.recipe, self.learner, self.directory, self.validator = recipe, learner, directory, validator
        self._randomness, self._stream, self._evaluation = randomness, stream, evaluation
        self._num_batches, self._stored = len(stream.loader), stored
        self._counted: Counted | None = None

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return self.learner.epoch >= self.recipe.epochs

    def take_up(self, before: int | None) -> None:
        """Continue from the checkpoint, if the run has one; `before` is the number of epochs of an extended run."""
        run, learner = self.directory, self.learner
        if run.begun:
            own = learner.state()
            saved = run.load_checkpoint(most_state_bytes(own))
            with run.reading(run.checkpoint):
                require_alike(saved, own)
                require_position(saved.get("place", (0, 0, 0)), self._num_batches, self.recipe.epochs)
            try:
                learner.load(saved)
            except Exception as cause:  # modules raise anything for a foreign state
                # Earlier releases read every tap as channels first.
                turned = [f"{tap}: channels_first" for tap, at in learner.layouts.items() if at == "channels_last"]
                entry = f"tap_layouts: {{{', '.join(turned)}}}, " if turned else ""
                raise MismatchError(
                    f"{run.checkpoint} is of another model or release: {cause}. "
                    f"Fix: {entry}the code that began this run, or another `out:`"
                ) from cause
            with run.reading(run.checkpoint):
                require_shapes(learner.optimizer)
        run.rewind(learner.epoch)
        if before is not None:
            extend(self.recipe, run, before, learner.step, self._num_batches)

    def step(self, batch: Batch) -> None:
        """Train on a batch; write a checkpoint if one is due."""
        started = time.perf_counter()
        recipe, learner = self.recipe, self.learner
        with self._randomness:
            progress = Progress(learner.step, self._num_batches, recipe.epochs)
            factor = recipe.schedule.factor(learner.step, self._num_batches, recipe.epochs)
            for group in learner.optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * factor
            batch_rows = self._rows(batch)
            rows = learner.ranks.mean_rows(batch_rows)
            parts = batch.parts(recipe.micro_batches)
            for part in parts:
                with learner.ranks.exchanging(learner.terms, part is parts[-1]):
                    terms: Tensor = learner.terms(part, progress)
                    part_rows = batch_rows if part is batch else self._rows(part)
                    # The gradient of (terms * share).sum(), without the two steps that its graph would have.
                    share = (part_rows / rows).to(terms.dtype)
                    terms.backward(learner.scaler.scale(share))  # type: ignore[no-untyped-call]
                learner.add(terms, part_rows)
            learner.scaler.unscale_(learner.optimizer)
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(learner.trained.parameters(), recipe.clip_norm)
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            learner.optimizer.zero_grad(set_to_none=True)
            learner.end_step()
        if recipe.checkpoint_steps is not None and learner.step % recipe.checkpoint_steps == 0:
            self.save()
        learner.seconds += time.perf_counter() - started

    def _rows(self, batch: Batch) -> Tensor:
        """Count the rows of each loss's mean, [L], so that micro-batches add up to the whole batch."""
        return torch.stack([loss.rows(batch) for loss in self.recipe.losses])

    def save(self) -> None:
        """Write a checkpoint; raises DivergenceError if the state is not finite."""
        self._require_finite()
        with self._randomness:
            self.directory.save_checkpoint(self.learner.state())

    def stopped(self, stop: StopFlag) -> Exception:
        """Return the error with which a stopped command ends."""
        return stop.stopped(
            f"stopped in epoch {self.learner.epoch + 1} after step {self.learner.step}; the state is in "
            f"{self.directory.checkpoint}. The same command with --resume continues"
        )

    def _require_finite(self) -> None:
        """Raise if training has diverged or a target is not finite: such a checkpoint would be useless."""
        learner = self.learner
        if not learner.finite():
            if self._stream.cache is not None:
                require_finite_targets(self._stream.loader, learner.epoch, learner.batch, self._stream.cache)
            raise DivergenceError(
                f"epoch {learner.epoch + 1}, step {learner.step}: the loss or the weights are no longer finite (loss "
                f"{sum(learner.means())}); the last checkpoint in {self.directory.path} is from before. Fix: train "
                "again into another `out:` with a lower optimizer.lr, schedule.warmup_epochs, or clip_norm"
            )

    @property
    def is_measured(self) -> bool:
        """Whether the model is measured at the end of this epoch."""
        if self.validator is None or self.recipe.validation is None:
            return False
        epochs = self.learner.epoch + 1
        return epochs == self.recipe.epochs or epochs % self.recipe.validation.every == 0

    def begin_measuring(self) -> None:
        """Prepare a measurement; write a checkpoint first, so that a stop loses nothing."""
        assert self.validator is not None
        self.save()
        self.learner.share_statistics()
        self._counted = Counted(self.validator, self.learner.measured, self.learner.device, self.recipe.precision)

    def measure(self, batch: Batch) -> None:
        """Count the answers of the model to a batch of validation images."""
        assert self._counted is not None, "begin_measuring comes first"
        with self._randomness:
            self._counted.add(batch)

    def end_epoch(self) -> dict[str, Any]:
        """Record the epoch and its metrics, advance to the next epoch, and return the metrics."""
        self._require_finite()
        recipe, learner, measured = self.recipe, self.learner, self._measured()
        means = learner.means()
        row: dict[str, Any] = {
            "epoch": learner.epoch,
            "step": learner.step,
            "lr": learner.optimizer.param_groups[0]["lr"],
            "loss": sum(means),
        }
        row |= {f"loss_{n}_{loss.kind}": mean for n, (loss, mean) in enumerate(zip(recipe.losses, means, strict=True))}
        row |= learner.in_effect(recipe.losses, Progress(learner.step - 1, self._num_batches, recipe.epochs))
        speed = self._stream.loader.images_per_epoch / max(learner.seconds, 1e-9)
        row |= {"seconds": round(learner.seconds, 3), "images_per_second": round(speed, 1)}
        row |= measured
        if recipe.keep == "best" and measured:
            keep_if_best(learner, self.directory, row)
        learner.end_epoch()
        self.directory.record(row)
        self.save()
        return row

    def _measured(self) -> dict[str, float]:
        if self._counted is None:
            return {}
        tally, self._counted = self._counted.total(self.learner.ranks), None
        return {f"val_{name}": value for name, value in asdict(tally.measures()).items() if value is not None}

    def finish(self) -> RunResult:
        """Write the kept weights and the result: the run is finished."""
        recipe, run, learner, loader = self.recipe, self.directory, self.learner, self._stream.loader
        rows, images = run.rows, recipe.epochs * loader.images_per_epoch
        last, kept = rows[-1], rows[best_epoch(rows) if recipe.keep == "best" else -1]
        evaluation = self._evaluation.model_copy(update={"epoch": kept["epoch"] + 1})
        learner.ranks.by_first(lambda: save_kept(recipe, run, learner, self._stored, evaluation))
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
            teacher_passes=images * self._stream.num_live,
            **measured,
        )
        run.finish(asdict(result))
        learner.ranks.by_first(lambda: run.best.unlink(missing_ok=True))
        return result
