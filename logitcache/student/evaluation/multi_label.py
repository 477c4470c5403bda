"""Figures for images of any number of classes: a yes or no to each."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from logitcache.student.evaluation.single_label import means_of_groups
from logitcache.targets import Targets

THRESHOLD = 0.5
"""An answer is yes if its probability is larger."""

Numbers = NDArray[np.float32 | np.float64]


@dataclass(frozen=True)
class MultiLabelMeasures:
    """Figures over the known labels; those of F1 and agreement take the answers for yes above a threshold.

    `mean_ap` and `f1_macro` are means over the classes that at least one image is known to be of; `f1_micro` counts all
    classes together. `agreement` is the fraction of all answers that are the teacher's, `kl` the mean over images and
    classes of the binary KL(teacher ‖ student) in nats at T = 1. None if there are no labels, or no teacher whose
    logits are all kept. Several teachers count as the mean of their probabilities.
    """

    mean_ap: float | None
    f1_macro: float | None
    f1_micro: float | None
    agreement: float | None
    kl: float | None
    teacher_mean_ap: float | None

    @property
    def quality(self) -> float | None:
        """The figure that models are compared by."""
        return self.mean_ap

    @property
    def teacher_quality(self) -> float | None:
        """The same of the teacher."""
        return self.teacher_mean_ap


@dataclass(frozen=True)
class ClassPrecision:
    """Average precision and F1 of one class; `images` are those known to be of it, `training_images` likewise."""

    label: int
    name: str | None
    images: int
    average_precision: float | None
    f1: float | None
    training_images: int | None


@dataclass(frozen=True)
class GroupPrecision:
    """The mean of the average precisions of the classes of a group, those that have one."""

    group: str
    training_images: str
    classes: int
    mean_ap: float | None


@dataclass(frozen=True)
class _Answers:
    """Logits, labels and, if there is a teacher, its log-odds of some rows, each [B, C]; and the sum of KL."""

    logits: Numbers
    labels: NDArray[np.int8]
    taught: Numbers | None
    kl: float


@dataclass(frozen=True)
class MultiLabelTally:
    """Answers and labels of rows, which add up: average precision ranks them all, so that all are kept."""

    parts: tuple[_Answers, ...]
    threshold: float = THRESHOLD

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, teachers: Mapping[str, Targets], threshold: float = THRESHOLD) -> Self:
        """Take a batch: logits [B, C], labels [B, C], 1, 0 or -1 for what is unknown, and the teachers' targets."""
        z = logits.to("cpu", torch.float64)
        taught, kl = None, 0.0
        if teachers and all(targets.keeps_logits for targets in teachers.values()):
            yes, no = binary_log_probs([targets.logits for targets in teachers.values()])
            taught = (yes - no).float().numpy()
            kl = float((yes.exp() * (yes - F.logsigmoid(z)) + no.exp() * (no - F.logsigmoid(-z))).sum())
        return cls((_Answers(z.float().numpy(), labels.to("cpu", torch.int8).numpy(), taught, kl),), threshold)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.parts + other.parts, self.threshold)

    def measures(self) -> MultiLabelMeasures:
        """Return the figures of all rows."""
        counts, precisions = self._counts, average_precisions(self.logits, self.labels)
        there = counts[:, 0] + counts[:, 2] > 0
        known = bool((self.labels >= 0).any())
        taught = self._taught
        agreement = None if taught is None else float((self._yes(taught) == self.answers).mean())
        return MultiLabelMeasures(
            mean_ap=_mean(precisions),
            f1_macro=_mean(_f1(counts)[there]),
            f1_micro=_mean(_f1(counts.sum(axis=0, keepdims=True))) if known else None,
            agreement=agreement,
            kl=None if taught is None else sum(part.kl for part in self.parts) / taught.size,
            teacher_mean_ap=None if taught is None else _mean(average_precisions(taught, self.labels)),
        )

    def per_class(
        self, names: tuple[str, ...] | None = None, training: NDArray[np.int64] | None = None
    ) -> tuple[ClassPrecision, ...]:
        """Return the figures of each class; `training` images [C] are stated beside them."""
        rows = zip(self._counts, average_precisions(self.logits, self.labels), _f1(self._counts), strict=True)
        return tuple(
            ClassPrecision(
                label,
                None if names is None else names[label],
                int(counts[0] + counts[2]),
                _number(precision),
                _number(f1) if counts[0] + counts[2] else None,
                None if training is None else int(training[label]),
            )
            for label, (counts, precision, f1) in enumerate(rows)
        )

    def groups(self, training: NDArray[np.int64] | None, head: int, tail: int) -> tuple[GroupPrecision, ...] | None:
        """Return the figures of classes by their `training` images [C]; None if these are not known."""
        precisions = [item.average_precision for item in self.per_class()]
        return means_of_groups(precisions, training, head, tail, GroupPrecision)

    @functools.cached_property
    def logits(self) -> Numbers:
        """The logits of all rows, [N, C]."""
        return np.concatenate([part.logits for part in self.parts])

    @functools.cached_property
    def labels(self) -> NDArray[np.int8]:
        """The labels of all rows, [N, C]."""
        return np.concatenate([part.labels for part in self.parts])

    @property
    def answers(self) -> NDArray[np.bool_]:
        """Whether the answers of all rows are yes, [N, C]."""
        return self._yes(self.logits)

    @functools.cached_property
    def _taught(self) -> Numbers | None:
        taught = [part.taught for part in self.parts if part.taught is not None]
        return np.concatenate(taught) if taught else None

    def _yes(self, log_odds: Numbers) -> NDArray[np.bool_]:
        return np.greater(log_odds, math.log(self.threshold / (1 - self.threshold)))

    @functools.cached_property
    def _counts(self) -> NDArray[np.int64]:
        """Right and wrong answers of yes, and wrong ones of no, [C, 3]."""
        yes, there, absent = self.answers, self.labels == 1, self.labels == 0
        return np.stack([(yes & there).sum(axis=0), (yes & absent).sum(axis=0), (~yes & there).sum(axis=0)], axis=1)


def binary_log_probs(answers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p and log(1 - p), float64 [B, C], p the mean of the σ(z) of several answers [B, C]."""
    z = torch.stack([logits.to("cpu", torch.float64) for logits in answers])
    yes, no = (torch.logsumexp(F.logsigmoid(sign * z), dim=0) - math.log(len(answers)) for sign in (1, -1))
    return yes, no


def average_precisions(scores: Numbers, labels: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return Σ (R_n - R_(n-1)) P_n over the thresholds of each class, [C]; NaN for classes that no image is of.

    `scores` and `labels`: [N, C]. Equal scores share a threshold, and rows whose label is unknown (-1) are left out.
    """
    return np.array([_average_precision(*column) for column in zip(scores.T, labels.T, strict=True)], np.float64)


def _average_precision(scores: Numbers, labels: NDArray[np.int8]) -> float:
    known = labels >= 0
    order = np.argsort(-scores[known], kind="stable")
    ranked, hits = scores[known][order], labels[known][order] == 1
    if not hits.any():
        return np.nan
    is_last = np.append(ranked[1:] != ranked[:-1], True)
    found, taken = np.cumsum(hits)[is_last], np.flatnonzero(is_last) + 1
    return float((np.diff(found, prepend=0) * found / taken).sum() / hits.sum())


def _f1(counts: NDArray[np.int64]) -> Numbers:
    """Return 2 TP / (2 TP + FP + FN) of rows of counts, 0 if nothing is there and nothing is found."""
    right, wrong, missed = counts.T
    return np.asarray(2 * right / np.maximum(2 * right + wrong + missed, 1))


def _mean(values: Numbers) -> float | None:
    """Return the mean of the values that are numbers; None without any."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else None


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
