"""What every loss shares."""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from logitcache.errors import RecipeError
from logitcache.recipe import Float
from logitcache.targets import Batch, Targets

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
