"""What every loss shares."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.recipe import Float
from logitcache.targets import Batch, Targets

UNLABELLED = -1

Need = Literal["labels", "single labels", "logits", "dense logits"]
"""What a loss asks for: labels, perhaps mixed; one label an image; the teacher's distribution; its raw logits."""

Weight = Annotated[Float, Field(ge=0.0)]


def targets_of(teachers: Mapping[str, Targets], name: str | None) -> Targets:
    """Return the targets of the named teacher, or of the only one."""
    if name is None and len(teachers) == 1:
        return next(iter(teachers.values()))
    if name is None or name not in teachers:
        raise RecipeError(
            f"a loss asks for teacher {name!r}; the cache has {sorted(teachers)}. Fix: set the loss's `teacher`"
        )
    return teachers[name]


def every_row(batch: Batch) -> Tensor:
    """Count the rows of a batch, on its device: the `rows` of a loss that is a mean over all of them."""
    return torch.full((), len(batch), device=batch.labels.device)


def labelled_rows(batch: Batch) -> Tensor:
    """Count the rows of a batch that have a label."""
    return (batch.labels != UNLABELLED).sum()


def mean_of_labelled(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of values [B] over the rows that have a label, 0 where none has."""
    known = labels != UNLABELLED
    return rows.where(known, 0).sum() / known.sum().clamp(min=1).to(rows.dtype)


def split_by_label(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split log-probabilities [B, C] into the label's [B], that of all others together [B], and theirs alone [B, C].

    The last is a distribution over the other classes, -inf at the label; of rows without a label the first class
    stands for it.
    """
    place = labels.clamp(min=0)[:, None]
    others = log_p.scatter(1, place, -torch.inf)
    rest = others.logsumexp(dim=1)
    return log_p.gather(1, place)[:, 0], rest, others - rest[:, None]


def cross(p: Tensor, log_q: Tensor) -> Tensor:
    """Return Σ p log q over classes, [B], with 0 log 0 = 0."""
    return (p * log_q.where(p > 0, 0)).sum(dim=1)
