"""A batch of synthesized images: a pure function of the seed, the teacher, the settings and the batch's number.

On another kind of processor, or with other versions, the same batch is rounded in another way.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from logitcache.classifier import Classifier
from logitcache.errors import DivergenceError
from logitcache.stage_one.synthesize import losses
from logitcache.stage_one.synthesize.losses import BatchNormInputs
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe
from logitcache.views.keys import Draws, Words, below, bernoulli, uniform

IMAGES_OF_A_CLASS = 2
"""Images in turn that have one label."""
_PIXELS, _STEPS = 0, 1
"""Ordinals of the words of a batch: those of its first pixels, and those of jitter and flips."""


@dataclass(frozen=True)
class SynthesizedBatch:
    """Images uint8 [B, C, H, W], their labels [B], and what was measured of them as they are written."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    losses: Mapping[str, float]
    teacher_accuracy: float
    student_agreement: float | None


@dataclass(frozen=True)
class Synthesizer:
    """What all batches share: a teacher of `num_classes`, images [C, H, W], and in an adaptive round a student."""

    recipe: SynthesizeRecipe
    teacher: Classifier
    student: Classifier | None
    num_classes: int
    image_shape: tuple[int, int, int]

    def batch(self, round_: int, number: int, before_step: Callable[[], object] = lambda: None) -> SynthesizedBatch:
        """Optimise batch `number` of a round. Raises DivergenceError if the loss does not stay finite.

        `before_step` is called before each step, and may raise to end the work.
        """
        recipe, labels = self.recipe, self._labels(number)
        pixels = self._first_pixels(round_, number).requires_grad_()
        targets = torch.from_numpy(labels).to(pixels.device)
        optimizer = torch.optim.Adam([pixels], lr=recipe.lr)
        steps = self._words(round_, number, _STEPS, recipe.steps, 3)
        shifts = below(steps[:, :2], 2 * recipe.jitter + 1) - recipe.jitter
        mirrored = bernoulli(steps[:, 2], 0.5) & recipe.flip
        # cuDNN may otherwise choose algorithms that add up in another order in every run.
        deterministic = torch.backends.cudnn.flags(enabled=True, deterministic=True)
        with BatchNormInputs(self.teacher.module) as statistics, deterministic:
            for step, (shift, is_mirrored) in enumerate(zip(shifts.tolist(), mirrored.tolist(), strict=True)):
                before_step()
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * (1 + math.cos(math.pi * step / recipe.steps)) / 2
                seen = torch.roll(pixels, shift, (2, 3))
                total = self.total(self.terms(seen.flip(3) if is_mirrored else seen, targets, statistics))
                (pixels.grad,) = torch.autograd.grad(total, [pixels])
                optimizer.step()
                with torch.no_grad():
                    pixels.clamp_(0, 1)
            return self._measured(pixels.detach(), targets, statistics, f"batch {number} of round {round_}")

    def terms(self, pixels: Tensor, labels: Tensor, statistics: BatchNormInputs) -> dict[str, Tensor]:
        """Return the losses, not yet weighted, of images [B, C, H, W] of 0 to 1 with labels [B]."""
        inputs = self.teacher.scale(pixels * 255)
        logits = self.teacher.checked(self.teacher.module(inputs))
        of_layers, features = statistics.take()
        first, *others = of_layers
        found = {
            "label": functional.cross_entropy(logits, labels),
            "batch_norm": self.recipe.losses.first_batch_norm * first + sum(others),
            "total_variation_l1": losses.total_variation_l1(inputs),
            "total_variation_l2": losses.total_variation_l2(inputs),
            "l2": losses.l2_norm(inputs),
            "diversity": losses.diversity_loss(features, labels),
        }
        if self.student is not None:
            answers = self.student.checked(self.student.module(self.student.scale(pixels * 255)))
            found["competition"] = losses.competition_loss(logits, answers)
        return found

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Add up the losses by their weights."""
        weights = {name: getattr(self.recipe.losses, name) for name in terms}
        return torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()

    @torch.no_grad()
    def _measured(self, pixels: Tensor, labels: Tensor, statistics: BatchNormInputs, who: str) -> SynthesizedBatch:
        """Round images to bytes, and measure these."""
        rounded = (pixels * 255).round().to(torch.uint8)
        terms = self.terms(rounded.float() / 255, labels, statistics)
        found = {name: float(term) for name, term in terms.items()}
        if not (torch.isfinite(pixels).all() and all(map(math.isfinite, found.values()))):
            raise DivergenceError(f"{who} diverges: its pixels or losses are inf or nan. Fix: a lower lr")
        answers = self.teacher(rounded).argmax(1)
        others = None if self.student is None else self.student(rounded).argmax(1)
        return SynthesizedBatch(
            rounded.cpu().numpy(),
            labels.cpu().numpy(),
            found,
            float((answers == labels).double().mean()),
            None if others is None else float((answers == others).double().mean()),
        )

    def _labels(self, number: int) -> NDArray[np.int64]:
        size = self.recipe.batch_size
        return np.arange(number * size, (number + 1) * size) // IMAGES_OF_A_CLASS % self.num_classes

    def _first_pixels(self, round_: int, number: int) -> Tensor:
        """Draw images float32 [B, C, H, W]: uniform, of the mean and deviation of the teacher's images, in 0 to 1."""
        size, count = self.recipe.batch_size, math.prod(self.image_shape)
        rows = [
            self._words(round_, number * size + row, _PIXELS, -(-count // 4), 4).reshape(-1)[:count]
            for row in range(size)
        ]
        noise = torch.from_numpy(uniform(np.stack(rows))).float().reshape(size, *self.image_shape).to(self.teacher.mean)
        return (self.teacher.mean + self.teacher.std * math.sqrt(3) * (2 * noise - 1)).clamp_(0, 1)

    def _words(self, round_: int, number: int, ordinal: int, rows: int, count: int) -> Words:
        """Return keyed random words [rows, count] of an image or a batch of a round."""
        number_of_round = np.full(rows, round_ << 32 | number, np.uint64)
        return Draws(self.recipe.seed, np.arange(rows, dtype=np.uint64), number_of_round).words(
            "synthesis", ordinal, count
        )


def seconds_of_step(synthesizer: Synthesizer) -> float:
    """Time a step: the second and third of a batch, as the first is slower."""
    moments: list[float] = []
    recipe = synthesizer.recipe.model_copy(update={"steps": 4})
    replace(synthesizer, recipe=recipe).batch(0, 0, lambda: moments.append(time.perf_counter()))
    return (moments[3] - moments[1]) / 2
