"""The variant of a teacher's network: chosen by time once, before the first shard, within a bound of the plain answers.

Grad-CAM maps and taps count as every target does: a variant in which one of them differs is left out.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from logitcache.cache.format.manifest import Manifest, TeacherEntry
from logitcache.classifier import PLAIN, Classifier, Variant
from logitcache.errors import RecipeError
from logitcache.models.variants import has_convolutions
from logitcache.runtime.console import logger
from logitcache.runtime.device import synchronize, to_device
from logitcache.runtime.versions import machine_of
from logitcache.targets import Targets
from logitcache.teacher.answers import Discrepancy, answers_of, worst_difference
from logitcache.teacher.tap_gradients import classes_of
from logitcache.teacher.teacher import Teacher, TeacherSource, tensors_of

ROUNDS, SECONDS = 3, 2.0
"""Passes that are timed of each variant; after so many seconds fewer, but one."""

LEAST_GAIN = 1.05
"""A variant that gains less is not worth answers that are rounded in another way."""

PASSES = 2
"""How often a variant that is not chosen by its time has the canaries answered: by the plain network, and by it."""

FIX_OF_RECORDED = "continue on a machine like the one that made the cache, or precompute into another `cache:`"

_VARIANTS = (Variant(channels_last=True), Variant(fold=True), Variant(channels_last=True, fold=True))


def settle_variants(
    teachers: Sequence[Teacher],
    sources: Mapping[str, TeacherSource],
    recorded: Mapping[str, TeacherEntry],
    pixels: Tensor,
    labels: Tensor,
    batch_size: int,
    most: int | None = None,
) -> None:
    """Let each teacher answer by the variant that its source asks for; of `auto` the recorded one, else the fastest.

    pixels: uint8 [K, C, H, W], the canaries, with their labels; a variant that is not chosen by its time answers at
    most the first `most`. Raises RecipeError for a variant that the network
    cannot take, or whose answers to them differ from the plain ones by more than the bound of `answers`.
    """
    for teacher in teachers:
        asked = sources[teacher.name].speed
        if asked == "auto" and teacher.name in recorded:
            asked = recorded[teacher.name].speed
        if asked is None or asked == PLAIN:
            continue
        if teacher.answers_by_key:
            raise RecipeError(f"teachers.{teacher.name}.speed: its answers lie in files. Fix: leave speed out")
        tried = slice(None if asked == "auto" else most)
        images, named = to_device(pixels[tried], teacher.device), to_device(labels[tried], teacher.device)
        trial = _Trial(teacher, images, named, batch_size)
        if asked == "auto":
            trial.take_fastest()
        else:
            trial.take(asked, FIX_OF_RECORDED if teacher.name in recorded else "leave it out")


def note_other_machine(recorded: Manifest, device: torch.device) -> None:
    """Warn if variants of networks are recorded that round in another way here than where the cache was made."""
    names = [name for name, entry in recorded.teachers.items() if entry.speed is not None]
    here = machine_of(device)
    differing = [key for key in here if recorded.versions.get(key, here[key]) != here[key]]
    if names and differing:
        there, now = (", ".join(f"{key} {side[key]}" for key in differing) for side in (recorded.versions, here))
        logger.warning(
            f"teachers.{', '.join(names)}: answers by a recorded variant, made on another machine ({there}); here is "
            f"{now}. It may round in another way here: rows that are written now agree with those of that machine "
            "within the bound, and may differ in bits"
        )


class _Trial:
    """A teacher that tries variants of its network on the canaries."""

    def __init__(self, teacher: Teacher, pixels: Tensor, labels: Tensor, batch_size: int) -> None:
        self._teacher, self._pixels, self._batch_size = teacher, pixels, batch_size
        answers = answers_of(teacher, pixels, labels)
        self._plain = tensors_of(answers)
        # A map must be of the class that it was of before, also if two logits are nearly equal.
        self._labels = classes_of(labels, answers.logits) if answers.keeps_logits else labels

    def take(self, variant: Variant, fix: str) -> None:
        """Answer by a variant. Raises RecipeError if the answers differ, or if the network cannot take it."""
        key = f"teachers.{self._teacher.name}.speed"
        try:
            self._answer_by(self._made(variant), variant)
            found = self._difference()
        except Exception as cause:  # the network's own code may raise anything
            raise RecipeError(f"{key}: {variant.text} fails for this network: {cause}. Fix: {fix}") from cause
        if not found.agrees:
            raise RecipeError(
                f"{key}: with {variant.text}, {found.target} differ by {found.share:.2g} of their scale, and "
                f"rounding in {self._teacher.precision} explains {found.bound:g}. Fix: {fix}"
            )

    def take_fastest(self) -> None:
        """Time every variant beside the plain network, and answer by the fastest that agrees with it."""
        name, best, gain, note = self._teacher.name, PLAIN, LEAST_GAIN, "no variant of its network is faster here"
        variants = _VARIANTS if has_convolutions(self._teacher.classifier.module) else ()
        if variants:
            logger.info(f"teacher {name!r}: {len(variants)} variants of its network are timed on the canaries")
        for variant in variants:
            made = None
            with suppress(Exception):  # the network's own code may raise anything, as it does of what it cannot take
                made = self._made(variant)
                self._answer_by(made, variant)
                found = self._difference()
            if made is None or not found.agrees:
                continue
            ratio = self._gain(made, variant)
            if ratio > gain:
                best, gain = variant, ratio
                note = (
                    f"{variant.text} is {gain:.2f} times as fast here; answers differ by at most {found.share:.1g} of "
                    f"their scale (bound {found.bound:g})"
                )
        self._answer_by(self._made(best), best)
        logger.info(f"teacher {name!r}: {note}")

    def _made(self, variant: Variant) -> Classifier:
        _, channels, height, width = self._pixels.shape
        return self._teacher.variant_of(variant, (channels, height, width))

    def _answer_by(self, classifier: Classifier, variant: Variant) -> None:
        self._teacher.remove_taps()
        self._teacher.answer_by(classifier, variant)

    def _difference(self) -> Discrepancy:
        """Compare the answers to the canaries with the plain ones."""
        answers: Targets = self._teacher(self._pixels, self._labels)
        return worst_difference(self._teacher, self._plain, tensors_of(answers))

    def _gain(self, made: Classifier, variant: Variant) -> float:
        """Return the median time of the plain network over that of a variant; they take turns."""
        times: dict[Variant, list[float]] = {PLAIN: [], variant: []}
        classifiers = {PLAIN: self._teacher.classifier, variant: made}
        started = time.monotonic()
        while len(times[variant]) < ROUNDS and (not times[variant] or time.monotonic() - started < SECONDS):
            for one, found in times.items():
                self._answer_by(classifiers[one], one)
                found.append(self._seconds())
        return statistics.median(times[PLAIN]) / statistics.median(times[variant])

    def _seconds(self) -> float:
        """Time a batch: the canaries, on an accelerator as often as fill one of the recipe's."""
        count = len(self._pixels)
        size = min(self._batch_size, count) if self._teacher.device.type == "cpu" else self._batch_size
        rows = torch.arange(size, device=self._pixels.device) % count
        pixels, labels = self._pixels[rows], self._labels[rows]
        synchronize(self._teacher.device)
        started = time.perf_counter()
        self._teacher(pixels, labels)
        synchronize(self._teacher.device)
        return time.perf_counter() - started
