"""Figures for images of one class: counts that add up over batches, and what is computed from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.logits import NO_LOGITS, log_probs
from logitcache.targets import Targets

NUM_BINS = 15

Counts = NDArray[np.float64]
G = TypeVar("G")


@dataclass(frozen=True)
class Measures:
    """Fractions of the labelled images (top-k) or of all (agreement); KL(teacher ‖ student) in nats at T = 1.

    `ece` is the expected calibration error of the labelled images: over 15 bins of equal width of the confidence, the
    mean of |accuracy - mean confidence|, weighted by their images (Guo et al., "On calibration of modern neural
    networks", ICML 2017). None if there are no labels or no teacher; top-5 also of five classes or fewer. Several
    teachers count as the mean of their probabilities.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    teacher_top1: float | None
    ece: float | None

    @property
    def quality(self) -> float | None:
        """The figure that models are compared by."""
        return self.top1

    @property
    def teacher_quality(self) -> float | None:
        """The same of the teacher."""
        return self.teacher_top1


@dataclass(frozen=True)
class ClassAccuracy:
    """Top-1 of the measured images of one class, a fraction; `training_images` are those it was trained on."""

    label: int
    name: str | None
    images: int
    top1: float | None
    training_images: int | None


@dataclass(frozen=True)
class GroupAccuracy:
    """The mean of the top-1 of the classes of a group, those that have measured images."""

    group: str
    training_images: str
    classes: int
    top1: float | None


@dataclass(frozen=True)
class Tally:
    """Counts of answers, which add up: of all rows [7], by bin of confidence [15, 3], by class [C, 2].

    Of rows: labelled, top-1, top-5, taught, agreeing, the sum of KL, the teacher's top-1. Of bins: rows, hits, the sum
    of confidences. Of classes: rows, hits.
    """

    rows: Counts
    bins: Counts
    classes: Counts

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, teachers: Mapping[str, Targets]) -> Self:
        """Count a batch: logits [B, C], labels int64 [B], -1 for none, and the teachers' targets."""
        found = _of_rows(logits, labels, teachers).to("cpu", torch.float64).numpy()
        label, top1, top5, confidence, taught, agreement, kl, teacher_top1 = found
        known = label >= 0
        sums = [known, top1, top5, taught, agreement, kl, teacher_top1]
        # Bins are open below and closed above, as in the paper.
        number = np.clip(np.ceil(np.nan_to_num(confidence[known]) * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        ones, hits = np.ones(known.sum()), top1[known]
        return cls(
            np.array([values.sum() for values in sums]),
            _summed(number, [ones, hits, confidence[known]], NUM_BINS),
            _summed(label[known].astype(np.int64), [ones, hits], logits.shape[1]),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(self.rows + other.rows, self.bins + other.bins, self.classes + other.classes)

    def measures(self) -> Measures:
        """Return the figures of all rows."""
        labelled, top1, top5, taught, agreement, kl, teacher_top1 = self.rows.tolist()
        return Measures(
            top1=top1 / labelled if labelled else None,
            top5=top5 / labelled if labelled and len(self.classes) > 5 else None,
            agreement=agreement / taught if taught else None,
            kl=kl / taught if taught else None,
            teacher_top1=teacher_top1 / labelled if labelled and taught else None,
            ece=float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()) / labelled if labelled else None,
        )

    def per_class(
        self, names: tuple[str, ...] | None = None, training: NDArray[np.int64] | None = None
    ) -> tuple[ClassAccuracy, ...]:
        """Return the accuracy of each class; `training` images [C] are stated beside it."""
        return tuple(
            ClassAccuracy(
                label,
                None if names is None else names[label],
                int(rows),
                hits / rows if rows else None,
                None if training is None else int(training[label]),
            )
            for label, (rows, hits) in enumerate(self.classes.tolist())
        )

    def groups(self, training: NDArray[np.int64] | None, head: int, tail: int) -> tuple[GroupAccuracy, ...] | None:
        """Return the accuracy of classes by their `training` images [C]; None if these are not known."""
        return means_of_groups([item.top1 for item in self.per_class()], training, head, tail, GroupAccuracy)


def _of_rows(logits: Tensor, labels: Tensor, teachers: Mapping[str, Targets]) -> Tensor:
    """Return what is counted of each row, [8, B]: one copy off the device for a batch."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & (labels[:, None] >= 0)
    log_p = log_probs(logits)
    nothing = torch.zeros_like(log_p[:, 0])
    taught = [nothing] * 4
    answers = [targets for targets in teachers.values() if targets.compact is not NO_LOGITS]
    if answers:
        p = torch.stack([log_probs(answer).exp() for answer in answers]).mean(dim=0)
        best = p.argmax(dim=1)
        kl = (torch.xlogy(p, p) - p * log_p).sum(dim=1)
        taught = [nothing + 1, best == ranked[:, 0], kl, best == labels]
    values: list[Any] = [labels, hits[:, 0], hits.any(dim=1), log_p.amax(dim=1).exp(), *taught]
    return torch.stack([value.to(log_p.dtype) for value in values])


def _summed(places: NDArray[np.int64], columns: list[Counts], count: int) -> Counts:
    """Sum columns [B] by place, [count, K]."""
    return np.stack([np.bincount(places, column, minlength=count) for column in columns], axis=1)


def means_of_groups(
    figures: Sequence[float | None],
    training: NDArray[np.int64] | None,
    head: int,
    tail: int,
    group: Callable[[str, str, int, float | None], G],
) -> tuple[G, ...] | None:
    """Return the mean of the figures [C] of classes by their `training` images [C]; None if these are not known.

    Groups are the classes of more than `head` images, of fewer than `tail`, and those between, as in Liu et al.,
    "Large-scale long-tailed recognition in an open world" (CVPR 2019), which calls them many-shot (> 100), few-shot
    (< 20) and medium-shot. A class without a figure does not count.
    """
    if training is None:
        return None
    members = {
        ("head", f"> {head}"): training > head,
        ("medium", f"{tail} to {head}"): (tail <= training) & (training <= head),
        ("tail", f"< {tail}"): training < tail,
    }
    groups = []
    for (name, training_images), chosen in members.items():
        found = [value for value in compress(figures, chosen) if value is not None]
        groups.append(group(name, training_images, len(found), float(np.mean(found)) if found else None))
    return tuple(groups)
