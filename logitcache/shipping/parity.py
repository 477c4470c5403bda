"""Compare an exported model with the one that it was made from, over all validation images."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from logitcache.errors import MismatchError
from logitcache.student.evaluation.multi_label import THRESHOLD
from logitcache.student.evaluation.single_label import Measures
from logitcache.student.evaluation.validation import Validator

TOLERANCE, LEAST_AGREEMENT = 1e-4, 0.999
LEAST_INT8_AGREEMENT = 0.9
"""Of an int8 file: with the float run, or with one that imitated int8 in training."""


@dataclass(frozen=True)
class Parity:
    """How far two models agree on `images`.

    `largest_difference` is that of two logits, `largest_logit` the scale that it is judged by, if above 1. `agreement`
    is the fraction of images with the same most probable class (of images of any number of classes, of answers with the
    same side of probability 0.5). `metric` names what `eager` and `exported` are, None without labels.
    """

    images: int
    largest_difference: float
    largest_logit: float
    agreement: float
    metric: str
    eager: float | None
    exported: float | None

    def require(self, what: str, tolerance: float) -> None:
        """Raise MismatchError for a difference above `tolerance` times the scale, or too few equal answers."""
        if self.largest_difference <= tolerance * max(1.0, self.largest_logit) and self.agreement >= LEAST_AGREEMENT:
            return
        raise MismatchError(
            f"{what} is not written: its logits differ from the run's by up to {self.largest_difference:.2g} (logits "
            f"up to {self.largest_logit:.3g}, tolerance {tolerance:g}), with the same answer on "
            f"{100 * self.agreement:.2f} % of {self.images} images.\n  Fix: --tolerance, if that is near enough"
        )

    def require_agreement(self, what: str, least: float) -> None:
        """Raise MismatchError if the fraction of equal answers of an int8 file is below `least`."""
        if self.agreement < least:
            raise MismatchError(
                f"{what} is not written: it gives the run's answer on {100 * self.agreement:.2f} % of "
                f"{self.images} images, at least {100 * least:g} % are asked for.\n"
                "  Fix: keep sensitive layers in float, calibrate on more images or train for longer; or a lower "
                "--least-agreement"
            )


def compare(eager: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], validator: Validator) -> Parity:
    """Run two models (uint8 pixels on the CPU in, logits out) over all images of a validator."""
    largest, scale, equal, answers, tallies = 0.0, 0.0, 0, 0, []
    for batch in validator.batches(torch.device("cpu"), "compare"):
        with torch.no_grad():
            logits = [predict(batch.images).float() for predict in (eager, exported)]
        own, other = logits
        largest = max(largest, float((own - other).abs().max()))
        scale = max(scale, float(own.abs().max()))
        same = predictions_of(own, validator.is_multi_label) == predictions_of(other, validator.is_multi_label)
        equal, answers = equal + int(same.sum()), answers + same.numel()
        tallies.append([validator.counts(each, batch) for each in logits])
    measures = [reduce(operator.add, column).measures() for column in zip(*tallies, strict=True)]
    return Parity(
        images=validator.num_images,
        largest_difference=largest,
        largest_logit=scale,
        agreement=equal / answers,
        metric="top1" if isinstance(measures[0], Measures) else "mean_ap",
        eager=measures[0].quality,
        exported=measures[1].quality,
    )


def predictions_of(logits: Tensor, is_multi_label: bool) -> Tensor:
    """Return the classes [B] that logits [B, K] answer or, of images of any number of classes, yes and no [B, K]."""
    return logits.sigmoid() > THRESHOLD if is_multi_label else logits.argmax(dim=1)
